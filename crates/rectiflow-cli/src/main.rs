//! The command `rectiflow`.
fn main() {}
