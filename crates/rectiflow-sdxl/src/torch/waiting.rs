//! How OpenMP's threads wait for their next work.
//!
//! GNU's OpenMP, which libtorch uses, lets a waiting thread spin for about a millisecond before it
//! sleeps. Beside other processes a spinning thread takes the time that a working one needs: a
//! training step takes eight times as long beside four busy processes, and 2.2 times the processor
//! time. With 10,000 turns it takes 4.7 times as long and 1.4 times the processor time. On an idle
//! machine it is as fast as before, where sleeping at once (`OMP_WAIT_POLICY=passive`) costs 8%.
//! Measured on an Intel Xeon, two cores: benches/runs/2026-11-29-busy.

use std::env;

/// Iterations that a waiting thread spins.
const SPINS: &str = "10000";
/// Variables by which a user chooses how threads wait.
const CHOSEN_BY: [&str; 3] = ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"];

/// Makes waiting threads sleep soon, unless an environment variable chooses how they wait.
///
/// OpenMP reads its variables before `main`, so this replaces the process by the same program with
/// the same arguments and one more variable. Programs call it first, before they start threads.
/// Returns where nothing is to do, or if the program cannot be started again.
pub fn sleep_soon() {
    let is_chosen = CHOSEN_BY.iter().any(|name| env::var_os(name).is_some());
    let is_alone = env::var_os("OMP_NUM_THREADS").is_some_and(|threads| threads == "1");
    if is_chosen || is_alone {
        return;
    }
    #[cfg(target_os = "linux")]
    if let Ok(program) = env::current_exe() {
        use std::{os::unix::process::CommandExt, process::Command};

        let mut arguments = env::args_os();
        let mut command = Command::new(program);
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        // On success this does not return.
        let error = command.args(arguments).env(CHOSEN_BY[0], SPINS).exec();
        tracing::debug!(%error, "waiting threads spin: the program cannot be started again");
    }
}
