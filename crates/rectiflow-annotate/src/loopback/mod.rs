//! A server of chat completions on this machine, for tests and measurements: no model, but the
//! answers, the delays and the faults of one.
//!
//! Written on plain sockets, because an HTTP library does not let a handler cause the faults that
//! matter: a body that is cut, a connection that is silent. It counts what it was asked about.

mod connection;
pub mod manner;
pub mod server;
