//! Why libtorch cannot use a GPU, in a sentence that says what to do.
//!
//! libtorch itself answers "0 devices" in every case, and prints a warning of several lines about
//! an old driver. So the driver is read from where its kernel module states it, and an old one is
//! refused before libtorch is asked.

use std::fs;

/// Where the kernel module of NVIDIA's driver states its version; absent without one.
const DRIVER: &str = "/proc/driver/nvidia/version";
/// The first driver for CUDA 13, which the pinned libtorch is built for (CUDA Toolkit Release
/// Notes, "CUDA Toolkit and Minimum Required Driver Version").
const OLDEST_DRIVER: u64 = 580;

/// Returns why libtorch cannot use GPU number `index`; `None` if it can.
pub fn why_not(index: usize) -> Option<String> {
    let driver = fs::read_to_string(DRIVER).ok();
    let has_cuda = tch::utils::has_cudart();
    if let Some(reason) = before_counting(has_cuda, driver.as_deref()) {
        return Some(reason);
    }
    let num_gpus = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    after_counting(index, num_gpus, driver.as_deref())
}

/// Returns what is known without asking CUDA.
fn before_counting(has_cuda: bool, driver: Option<&str>) -> Option<String> {
    if !has_cuda {
        return Some(
            "this rectiflow was built on a libtorch without CUDA; build it with \
             `RECTIFLOW_LIBTORCH=cuda make build`, or choose the device cpu"
                .to_owned(),
        );
    }
    let version = version_of(driver?)?;
    let major: u64 = version.split('.').next()?.parse().ok()?;
    (major < OLDEST_DRIVER).then(|| {
        format!(
            "NVIDIA's driver {version} is too old for this libtorch's CUDA 13; install \
             {OLDEST_DRIVER} or newer"
        )
    })
}

/// Returns what the number of GPUs that libtorch sees says.
fn after_counting(index: usize, num_gpus: usize, driver: Option<&str>) -> Option<String> {
    if index < num_gpus {
        return None;
    }
    Some(match (num_gpus, driver) {
        (0, None) => format!(
            "this machine has no NVIDIA driver ({DRIVER} is absent); install {OLDEST_DRIVER} or \
             newer, or choose the device cpu"
        ),
        (0, Some(driver)) => format!(
            "libtorch sees no GPU, though NVIDIA's driver {} is loaded; see what `nvidia-smi` and \
             CUDA_VISIBLE_DEVICES say",
            version_of(driver).unwrap_or("of unknown version")
        ),
        (_, _) => format!("libtorch sees {num_gpus} GPUs, of which cuda:0 is the first"),
    })
}

/// Returns the version in the driver's own line, such as "NVRM version: NVIDIA UNIX x86_64 Kernel
/// Module  535.161.08  Mon ...": its first word of numbers and dots.
fn version_of(driver: &str) -> Option<&str> {
    let is_version =
        |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    driver.split_whitespace().find(is_version)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 24\n\
                       GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n";
    const NEW: &str = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.105.06  \
                       Release Build\n";

    #[test]
    fn each_cause_has_its_own_sentence() {
        let no_cuda = before_counting(false, Some(NEW)).expect("a reason");
        assert!(
            no_cuda.contains("RECTIFLOW_LIBTORCH=cuda make build"),
            "{no_cuda}"
        );
        let old = before_counting(true, Some(OLD)).expect("a reason");
        assert!(old.contains("535.161.08") && old.contains("580"), "{old}");
        assert_eq!(before_counting(true, Some(NEW)), None);
        assert_eq!(before_counting(true, None), None);

        let none = after_counting(0, 0, None).expect("a reason");
        assert!(
            none.contains("no NVIDIA driver") && none.contains("580"),
            "{none}"
        );
        let hidden = after_counting(0, 0, Some(NEW)).expect("a reason");
        assert!(
            hidden.contains("580.105.06") && hidden.contains("CUDA_VISIBLE"),
            "{hidden}"
        );
        let few = after_counting(4, 4, Some(NEW)).expect("a reason");
        assert!(few.contains("sees 4 GPUs"), "{few}");
        assert_eq!(after_counting(3, 4, Some(NEW)), None);
        for reason in [no_cuda, old, none, hidden, few] {
            assert!(!reason.contains('\n'), "{reason}");
        }
    }

    #[test]
    fn a_driver_that_states_no_version_is_not_called_old() {
        for text in ["", "NVRM version: of its own\n", "a..b 5a.1 x"] {
            assert_eq!(before_counting(true, Some(text)), None, "{text}");
            assert!(after_counting(0, 0, Some(text)).is_some(), "{text}");
        }
    }
}
