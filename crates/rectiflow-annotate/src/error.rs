//! The errors of this crate, by meaning.

/// A failure of this crate. Each message says what, where, what was expected and found, and what to
/// do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Pictures, tables or files.
    #[error(transparent)]
    Data(#[from] rectiflow_data::Error),
    /// A setting or a combination of settings that cannot work.
    #[error("{what}: {reason}")]
    Invalid {
        /// The setting, as the user writes it.
        what: String,
        /// Why it cannot work, and what would.
        reason: String,
    },
    /// A server that cannot be used, and what to do.
    #[error("{server}: {reason}")]
    Server {
        /// Its URL.
        server: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A server that does not look at the pictures.
    #[error(
        "{server}: \"{model}\" does not see pictures: {reason}; serve a model with vision and see \
         that the server accepts images, or set caption.probe = false if you know better"
    )]
    Blind {
        /// Its URL.
        server: String,
        /// The model.
        model: String,
        /// What gave it away.
        reason: String,
    },
    /// ONNX Runtime is missing, or does not fit; where it was looked for, and what to do.
    #[error("{0}")]
    NoRuntime(String),
    /// A file that is no model, or one that does not look at pictures.
    #[error("{}: {reason}", path.display())]
    Model {
        /// The file.
        path: std::path::PathBuf,
        /// What it has, and what is expected.
        reason: String,
    },
    /// A table that another process is writing.
    #[error("{what}: {reason}")]
    NotReady {
        /// The table.
        what: String,
        /// Who is writing it, and what to do.
        reason: String,
    },
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Invalid`].
    pub(crate) fn invalid(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid {
            what: what.into(),
            reason: reason.into(),
        }
    }
}
