//! Latents on their way to a URL while others are encoded: a data set need not fit on the disk.
//!
//! A thread sends the latents of each finished object, notes that in the object's journal, and
//! deletes them. Encoding waits when [`OBJECTS_AHEAD`] objects wait to be sent. The other files of
//! a data set are small, and `publish` sends them at the end. A killed run resumes: latents that
//! are still here are sent again.

use std::{
    sync::mpsc::{Receiver, sync_channel},
    thread,
};

use crate::{
    durable,
    error::{Error, Result},
    prep::{
        journal::{Journal, Store, latents_name},
        publish::remote_at,
    },
    remote::{Remote, upload::send},
};

/// Finished objects that wait to be sent.
const OBJECTS_AHEAD: usize = 1;

/// The URL of a data set.
#[derive(Debug)]
pub(crate) struct Outlet {
    remote: Remote,
}

impl Outlet {
    /// The outlet to `url`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not a URL.
    pub(crate) fn new(url: &str) -> Result<Self> {
        Ok(Self {
            remote: remote_at(url)?,
        })
    }

    /// Runs `work`, which passes on the journals of finished objects, and sends their latents
    /// beside it. Returns when all are sent.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Remote`] if the store fails; [`Error::Io`].
    pub(crate) fn while_sending(
        &self,
        store: &Store,
        work: impl FnOnce(&mut dyn FnMut(&Journal) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        thread::scope(|scope| {
            let (sender, journals) = sync_channel::<Journal>(OBJECTS_AHEAD);
            let sending = scope.spawn(move || self.send_all(store, &journals));
            let mut pass_on = |journal: &Journal| {
                let is_sent = sender.send(journal.clone()).is_ok();
                is_sent.then_some(()).ok_or_else(stopped)
            };
            let worked = work(&mut pass_on);
            drop(sender);
            let sent = sending.join().expect("sending does not panic");
            // The store's failure is why passing on failed.
            sent.and(worked)
        })
    }

    fn send_all(&self, store: &Store, journals: &Receiver<Journal>) -> Result<()> {
        for mut journal in journals {
            if journal.is_sent || journal.rows.is_empty() {
                continue;
            }
            let name = latents_name(&journal.stem);
            send(&self.remote, &store.root, &name)?;
            journal.is_sent = true;
            store.write_journal(&journal)?;
            durable::remove(&store.root.join(name))?;
        }
        Ok(())
    }
}

/// Sending has ended early; its own error says why.
fn stopped() -> Error {
    Error::Invalid {
        what: "the data set's URL".to_owned(),
        reason: "sending has failed".to_owned(),
    }
}
