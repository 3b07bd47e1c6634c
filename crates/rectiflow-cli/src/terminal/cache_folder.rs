//! The folder for what can be made again: libraries, and data sets on their way to a URL.

use std::{env, path::PathBuf};

/// `$XDG_CACHE_HOME/rectiflow`, or `~/.cache/rectiflow`. None if neither variable is set.
pub(crate) fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = || set("HOME").map(|home| home.join(".cache"));
    let cache = set("XDG_CACHE_HOME").or_else(home)?;
    Some(cache.join("rectiflow"))
}
