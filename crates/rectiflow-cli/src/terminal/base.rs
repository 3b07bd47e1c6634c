//! The argument that says where a checkpoint's base is.

use std::path::{Path, PathBuf};

use rectiflow_train::bases::Bases;

/// `--base`.
#[derive(Debug, clap::Args)]
pub(crate) struct BaseArg {
    /// The base of a training checkpoint, if it has moved: a model with the parts that were not
    /// trained, which are found by their hashes.
    #[arg(long, value_name = "MODEL")]
    base: Option<PathBuf>,
}

impl BaseArg {
    /// Returns the path, if it is given.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.base.as_deref()
    }

    /// Returns the bases of a command without a recipe.
    pub(crate) fn bases(&self) -> Bases {
        Bases::new(None, self.path())
    }
}
