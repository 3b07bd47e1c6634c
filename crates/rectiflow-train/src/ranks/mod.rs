//! Several processes as one run: how they find each other, what they exchange, and how a dead one
//! is detected.

pub(crate) mod agree;
pub(crate) mod c10d;
pub mod comm;
pub(crate) mod exchange;
pub(crate) mod gather;
pub mod launch;
pub(crate) mod pulse;
pub(crate) mod reduce;
pub(crate) mod rendezvous;
pub(crate) mod spare;
pub mod straggler;
pub mod traffic;
