//! The number of threads that tests calculate with.

use std::env;

/// Makes libtorch use as many threads as `RECTIFLOW_TEST_THREADS` says, one unless it is set.
///
/// # Panics
/// If the variable is not a whole number above 0.
#[doc(hidden)]
pub fn set() {
    let threads = match env::var("RECTIFLOW_TEST_THREADS") {
        Ok(text) => text.parse().ok().filter(|&threads| threads > 0),
        Err(_) => Some(1),
    };
    tch::set_num_threads(threads.expect("RECTIFLOW_TEST_THREADS is a whole number above 0"));
}
