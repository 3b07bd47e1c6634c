//! ONNX Runtime's shared library: where it is looked for, and how it is loaded, once a process.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
};

use ort::{environment::Environment, logging::LogLevel};

use crate::error::{Error, Result};

/// The version that scripts/onnx_runtime.py fetches.
pub const VERSION: &str = "1.31.1";
/// The variable by which a user names the library; the same as in programs of the crate `ort`.
pub const VARIABLE: &str = "ORT_DYLIB_PATH";
/// Name of the library's file.
const FILE: &str = "libonnxruntime.so";

/// Where the library is looked for, in this order.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// The file that the user names. If there is one, no other place is looked at.
    pub named: Option<PathBuf>,
    /// The folder of the program.
    pub beside: Option<PathBuf>,
    /// The folder in which scripts/onnx_runtime.py keeps libraries.
    pub cache: Option<PathBuf>,
}

impl Places {
    /// The library's file.
    ///
    /// # Errors
    /// [`Error::NoRuntime`] if no place has it.
    pub fn find(&self) -> Result<PathBuf> {
        if let Some(named) = &self.named {
            if named.is_file() {
                return Ok(named.clone());
            }
            return Err(Error::NoRuntime(format!(
                "{VARIABLE}={}: there is no such file; name an existing {FILE}.1.*, or unset the \
                 variable",
                named.display()
            )));
        }
        let mut looked = Vec::new();
        for path in self.candidates() {
            if path.is_file() {
                return Ok(path);
            }
            looked.push(path.display().to_string());
        }
        Err(Error::NoRuntime(format!(
            "ONNX Runtime is missing, there is no {}: run python3 scripts/onnx_runtime.py, which \
             fetches it, or `pip install onnxruntime=={VERSION}` and name its file \
             onnxruntime/capi/{FILE}.{VERSION} by {VARIABLE}",
            looked.join(" and no ")
        )))
    }

    fn candidates(&self) -> Vec<PathBuf> {
        let cached = |cache: &PathBuf| cache.join(format!("onnxruntime-{VERSION}-cpu")).join(FILE);
        let beside = self.beside.iter().map(|folder| folder.join(FILE));
        beside.chain(self.cache.iter().map(cached)).collect()
    }
}

/// Loads the library, unless this process has loaded it.
///
/// # Errors
/// [`Error::NoRuntime`] if it is missing, or no ONNX Runtime that fits.
pub(crate) fn environment(places: &Places) -> Result<&'static Environment> {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    static LOADING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(environment) = ENVIRONMENT.get() {
        return Ok(environment);
    }
    let environment = load(&places.find()?)?;
    Ok(ENVIRONMENT.get_or_init(|| environment))
}

fn load(path: &Path) -> Result<Environment> {
    let builder = ort::init_from(path).map_err(|error| {
        Error::NoRuntime(format!(
            "{}: no ONNX Runtime that fits ({error}): run python3 scripts/onnx_runtime.py, or name \
             the {FILE} of onnxruntime {VERSION} by {VARIABLE}",
            path.display()
        ))
    })?;
    let logger = |level: LogLevel, _: &str, _: &str, place: &str, message: &str| {
        tracing::debug!(target: "onnxruntime", ?level, place, "{message}");
    };
    let environment = builder
        .with_name("rectiflow")
        .with_telemetry(false)
        .with_logger(std::sync::Arc::new(logger))
        .build()
        .map_err(|error| Error::NoRuntime(format!("{}: {error}", path.display())))?;
    environment.set_log_level(LogLevel::Warning);
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_named_file_counts_before_the_program_s_folder_and_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let beside = folder.path().join("bin");
        let cached = folder.path().join(format!("onnxruntime-{VERSION}-cpu"));
        for place in [&beside, &cached] {
            fs::create_dir_all(place).unwrap();
        }
        let mut places = Places {
            named: None,
            beside: Some(beside.clone()),
            cache: Some(folder.path().to_owned()),
        };
        let missing = places.find().unwrap_err().to_string();
        for part in [
            "onnx_runtime.py",
            VARIABLE,
            "bin/libonnxruntime.so",
            VERSION,
        ] {
            assert!(missing.contains(part), "{missing}");
        }
        assert_eq!(missing.lines().count(), 1);
        fs::write(cached.join(FILE), "").unwrap();
        assert_eq!(places.find().unwrap(), cached.join(FILE));
        fs::write(beside.join(FILE), "").unwrap();
        assert_eq!(places.find().unwrap(), beside.join(FILE));
        places.named = Some(folder.path().join("gone.so"));
        let missing = places.find().unwrap_err().to_string();
        assert!(
            missing.contains("gone.so: there is no such file"),
            "{missing}"
        );
        places.named = Some(beside.join(FILE));
        assert_eq!(places.find().unwrap(), beside.join(FILE));
    }

    #[test]
    fn a_file_that_is_no_library_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.so");
        fs::write(&path, "no library").unwrap();
        let error = load(&path).unwrap_err().to_string();
        assert!(
            error.contains("text.so: no ONNX Runtime that fits"),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}
