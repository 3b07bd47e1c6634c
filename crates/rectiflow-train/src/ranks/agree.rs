//! Agreement between ranks: numbers and texts of all ranks, a value from rank 0, and whether any
//! rank has failed.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tch::{Device, Tensor};

use crate::{
    error::{Error, Result},
    ranks::comm::Comm,
};

impl Comm {
    /// Returns the numbers of all ranks, in the order of the ranks, bit for bit. Every rank must
    /// pass equally many.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn gather_numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>> {
        let all = self
            .gather(&Tensor::from_slice(own))?
            .to_device(Device::Cpu);
        let row = |rank| Vec::try_from(all.get(rank)).expect("a row of numbers");
        Ok((0..self.rank().ranks as i64).map(row).collect())
    }

    /// Like [`Self::gather_numbers`], with a single number from each rank.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub(crate) fn gather_number(&self, own: f64) -> Result<Vec<f64>> {
        Ok(self.gather_numbers(&[own])?.into_iter().flatten().collect())
    }

    /// Returns the sums of each number over all ranks, added in the order of the ranks and
    /// therefore bit for bit the same on all of them.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn sum_numbers(&self, own: &[f64]) -> Result<Vec<f64>> {
        let all = self.gather_numbers(own)?;
        let sum = |at: usize| all.iter().map(|numbers| numbers[at]).sum();
        Ok((0..own.len()).map(sum).collect())
    }

    /// Returns the texts of all ranks, in the order of the ranks.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn gather_texts(&self, own: &str) -> Result<Vec<String>> {
        let lengths: Vec<usize> = self
            .gather_number(own.len() as f64)?
            .into_iter()
            .map(|length| length as usize)
            .collect();
        let mut bytes = own.as_bytes().to_vec();
        bytes.resize(lengths.iter().copied().max().unwrap_or(0).max(1), 0);
        let all = self
            .gather(&Tensor::from_slice(&bytes))?
            .to_device(Device::Cpu);
        let text = |(rank, length): (i64, usize)| {
            let bytes: Vec<u8> = Vec::try_from(all.get(rank)).expect("a row of bytes");
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        };
        Ok((0..).zip(lengths).map(text).collect())
    }

    /// Returns what `make` returns on rank 0, on all ranks. If it fails, it fails on all ranks.
    ///
    /// # Errors
    /// On rank 0, the error of `make`. On other ranks, the same error if it is a stop by the guard,
    /// otherwise [`Error::OtherRank`]. [`Error::Collective`].
    pub(crate) fn first<T: Serialize + DeserializeOwned>(
        &self,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if self.rank().ranks == 1 {
            return make();
        }
        let made = if self.is_first() { Some(make()) } else { None };
        let told = match &made {
            None => String::new(),
            Some(Ok(value)) => {
                serde_json::to_string(&Told::Made(value)).expect("plain data fits into JSON")
            }
            Some(Err(error)) => {
                serde_json::to_string(&Told::<()>::of(error)).expect("plain data fits into JSON")
            }
        };
        let told = self.gather_texts(&told)?.swap_remove(0);
        if let Some(made) = made {
            return made;
        }
        match serde_json::from_str(&told).expect("rank 0 serialised it") {
            Told::Made(value) => Ok(value),
            Told::Stopped { run_dir, reason } => Err(Error::Stopped { run_dir, reason }),
            Told::Failed { message } => Err(Error::OtherRank { rank: 0, message }),
        }
    }

    /// Returns this rank's value if all ranks succeeded. If any failed, all ranks fail.
    ///
    /// # Errors
    /// This rank's own error; [`Error::OtherRank`] with that of the first rank that failed;
    /// [`Error::Collective`].
    pub(crate) fn all_could<T>(&self, own: Result<T>) -> Result<T> {
        let message = own
            .as_ref()
            .err()
            .map(ToString::to_string)
            .unwrap_or_default();
        let messages = self.gather_texts(&message)?;
        let value = own?;
        match messages
            .into_iter()
            .enumerate()
            .find(|(_, message)| !message.is_empty())
        {
            None => Ok(value),
            Some((rank, message)) => Err(Error::OtherRank { rank, message }),
        }
    }
}

/// A message from rank 0 to the others.
#[derive(Serialize, Deserialize)]
enum Told<T> {
    Made(T),
    Stopped {
        run_dir: std::path::PathBuf,
        reason: String,
    },
    Failed {
        message: String,
    },
}

impl<T> Told<T> {
    fn of(error: &Error) -> Self {
        match error {
            Error::Stopped { run_dir, reason } => Self::Stopped {
                run_dir: run_dir.clone(),
                reason: reason.clone(),
            },
            error => Self::Failed {
                message: error.to_string(),
            },
        }
    }
}
