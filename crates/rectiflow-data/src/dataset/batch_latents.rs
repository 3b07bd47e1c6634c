//! The latents of a micro-batch, in memory that the loader uses again once the batch is dropped.
//!
//! A fresh 2 MB costs the kernel as much time as copying into it.

use std::{
    fmt,
    ops::{Deref, DerefMut},
};

use half::f16;

use crate::remote::buffers::{Buffers, Lent};

/// Posterior means of the samples of a micro-batch, unscaled, `[n, C, h, w]`. A slice of numbers;
/// dropping it returns its memory to the loader.
pub struct BatchLatents(Lent<f16>);

impl BatchLatents {
    /// `len` numbers of any value, for a caller that writes all of them.
    pub(crate) fn unwritten(buffers: &Buffers<f16>, len: usize) -> Self {
        Self(buffers.take_filled(len))
    }
}

impl Deref for BatchLatents {
    type Target = [f16];

    fn deref(&self) -> &[f16] {
        &self.0
    }
}

impl DerefMut for BatchLatents {
    fn deref_mut(&mut self) -> &mut [f16] {
        &mut self.0
    }
}

impl fmt::Debug for BatchLatents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Clone for BatchLatents {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl PartialEq for BatchLatents {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl PartialEq<Vec<f16>> for BatchLatents {
    fn eq(&self, other: &Vec<f16>) -> bool {
        **self == **other
    }
}
