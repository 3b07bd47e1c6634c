//! Ctrl-C and SIGTERM: the first asks the work to stop after its current step. Ctrl-C after it ends
//! the process at once. SIGTERM after it changes nothing: Slurm sends it twice before a preemption,
//! within a tenth of a second, and once more at a time limit.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

/// Whether this process has been asked to stop.
#[derive(Debug)]
pub(crate) struct StopSignal {
    asked: Arc<AtomicBool>,
    which: Arc<AtomicUsize>,
}

impl StopSignal {
    /// Takes over Ctrl-C and SIGTERM for the rest of the process.
    pub(crate) fn listen() -> io::Result<Self> {
        let (asked, which) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicUsize::new(0)),
        );
        // The order matters: Ctrl-C exits if an earlier signal has set the flag.
        flag::register_conditional_shutdown(SIGINT, 128 + SIGINT, Arc::clone(&asked))?;
        for signal in [SIGINT, SIGTERM] {
            flag::register_usize(signal, Arc::clone(&which), signal as usize)?;
            flag::register(signal, Arc::clone(&asked))?;
        }
        Ok(Self { asked, which })
    }

    /// Treats the end of standard input as a request to stop: the parent process closes it to stop
    /// this one, and its death closes it too.
    pub(crate) fn listen_for_end_of_input(&self) {
        let asked = Arc::clone(&self.asked);
        thread::spawn(move || {
            // Nothing is ever written to it; an error counts as its end.
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            asked.store(true, Ordering::Relaxed);
        });
    }

    /// Set once a signal has arrived.
    pub(crate) fn flag(&self) -> &AtomicBool {
        &self.asked
    }

    /// The latest signal, if any.
    pub(crate) fn signal(&self) -> Option<i32> {
        match self.which.load(Ordering::Relaxed) {
            0 => None,
            signal => i32::try_from(signal).ok(),
        }
    }
}
