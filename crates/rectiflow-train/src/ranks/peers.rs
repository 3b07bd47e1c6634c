//! The connection to the other ranks: their process group, patience with those that are slow, and
//! memory that messages arrive in.

use std::{
    mem::forget,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tch::{Device, Kind, Tensor};

use crate::{
    error::{Error, Result},
    ranks::{
        c10d::{Group, Store, Transport, Work},
        launch::{Launch, RanksConfig},
        pulse::Pulse,
        rendezvous::Rendezvous,
    },
};

/// The other ranks, as this one reaches them.
#[derive(Debug)]
pub(crate) struct Peers {
    /// `None` once it is broken: what never ends cannot be closed.
    group: Option<Group>,
    pub(crate) transport: Transport,
    /// Where small messages are made.
    pub(crate) device: Device,
    timeout: Duration,
    pub(crate) pulse: Pulse,
    pub(crate) serves_store: bool,
    broken: AtomicBool,
    /// Where messages arrive: memory that is allocated for each would be zeroed by the system each time.
    spare: Mutex<Vec<Tensor>>,
    // Last: the group and the pulse have to end before the store that this process may serve.
    _store: Store,
}

/// A collective in progress is left alone for so long before others' failures are looked at.
const GLANCE: Duration = Duration::from_millis(100);

impl Peers {
    /// Meets the other ranks.
    ///
    /// # Errors
    /// [`Error::Launch`] where they do not come, the port is in use, or the build has no NCCL for a GPU.
    pub(crate) fn open(launch: &Launch, device: Device, config: &RanksConfig) -> Result<Self> {
        let Rendezvous { group, transport, store, pulse_store, serves_store } =
            Rendezvous::open(launch, device, config)?;
        Ok(Self {
            group: Some(group),
            transport,
            device,
            timeout: config.timeout(),
            pulse: Pulse::start(pulse_store, launch.rank),
            serves_store,
            broken: AtomicBool::new(false),
            spare: Mutex::default(),
            _store: store,
        })
    }

    /// The process group.
    ///
    /// # Errors
    /// [`Error::Launch`] once a collective has failed.
    pub(crate) fn group(&self) -> Result<&Group> {
        let broken = || Error::Launch { reason: "a collective has failed before: this process should end".to_owned() };
        self.group.as_ref().filter(|_| !self.broken.load(Ordering::SeqCst)).ok_or_else(broken)
    }

    /// No collective is begun any more.
    pub(crate) fn break_down(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    /// Waits for a work; the reason where it cannot be done.
    pub(crate) fn wait(&self, work: Work, began: Instant) -> std::result::Result<(), String> {
        let mut patience = self.timeout;
        loop {
            let reason = match work.wait(GLANCE) {
                Ok(true) => return Ok(()),
                Ok(false) if began.elapsed() > patience => {
                    patience += self.timeout;
                    self.pulse.investigate(self.timeout)
                }
                Ok(false) => self.pulse.failure(),
                Err(reason) => Some(self.pulse.investigate(self.timeout).unwrap_or(reason)),
            };
            if let Some(reason) = reason {
                // It may still be writing into its tensors.
                forget(work);
                return Err(reason);
            }
        }
    }

    /// Memory for at least `len` elements, with arbitrary values; to be released.
    pub(crate) fn take(&self, len: i64, kind: Kind, device: Device) -> Tensor {
        let mut spare = self.spare();
        let fits = |kept: &Tensor| kept.kind() == kind && kept.device() == device && kept.numel() as i64 >= len;
        let found = spare.iter().position(fits).map(|at| spare.swap_remove(at));
        found.unwrap_or_else(|| {
            // What is too small now will be again.
            spare.retain(|kept| kept.kind() != kind);
            Tensor::empty([len], (kind, device))
        })
    }

    /// Keeps memory that was taken for the next message.
    pub(crate) fn release(&self, memory: Tensor) {
        self.spare().push(memory);
    }

    fn spare(&self) -> MutexGuard<'_, Vec<Tensor>> {
        // Nothing panics while it holds the lock.
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        if self.broken.load(Ordering::SeqCst) {
            // Closing waits for works in progress, which may never end.
            forget(self.group.take());
        }
    }
}
