//! The memory of CPU tensors: packed into one region of addresses, in huge pages if the system has
//! them.
//!
//! During a training step the C library's allocator holds a fifth more memory than the tensors'
//! peak: free memory lies in gaps between small blocks that live longer, and blocks of 32 MiB and
//! more are separate mappings, returned and mapped again with a page fault for every 4 KiB. Here
//! tensors of 64 KiB and more have their own region (`allocator.cpp`), and each takes the smallest
//! gap that fits. A step then takes 0.91 of the time and 0.87 of the memory (docs/log.md,
//! 2026-11-26), and resident memory matches what an estimate can count. Smaller tensors, and memory
//! that is no tensor's, stay with the C library.
//!
//! Every model calls [`pack_tensors`] before it allocates ([`crate::weights::Weights`]), so tests,
//! examples and users of the library run as the command does. The memory of a tensor does not
//! change its numbers.
//!
//! Linux only; elsewhere, and where addresses are limited (`ulimit -v`), the C library's allocator
//! stays.

use std::sync::Once;

/// Allocates this process's CPU tensors in the region from now on; existing ones stay where they
/// are. Only the first call has an effect.
///
/// libtorch keeps its allocator in a variable without a lock: the first call must come before other
/// threads create tensors.
pub fn pack_tensors() {
    static PACKED: Once = Once::new();
    // SAFETY: the function has no arguments, and its allocator lives as long as the process.
    PACKED.call_once(|| unsafe { rectiflow_pack_tensors() });
}

/// Returns the memory between tensors to the system. To be called after work with a much larger
/// peak than what follows.
pub fn empty_gaps() {
    // SAFETY: no pointer refers to memory in a gap.
    unsafe { rectiflow_empty_gaps() }
}

unsafe extern "C" {
    fn rectiflow_pack_tensors();
    fn rectiflow_empty_gaps();
    #[cfg(test)]
    fn rectiflow_reach() -> usize;
}

/// Returns the bytes of the region in use, gaps included. Other tests can run in this process, so
/// only large differences count.
#[cfg(test)]
pub(crate) fn reach() -> usize {
    // SAFETY: the function has no arguments.
    unsafe { rectiflow_reach() }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::{env, process::Command, thread};

    use tch::{Device, Kind, Tensor};

    use super::*;

    fn megabytes(count: i64, value: f64) -> Tensor {
        Tensor::full([count << 18], value, (Kind::Float, Device::Cpu))
    }

    fn is_all(tensor: &Tensor, value: f64) -> bool {
        tensor.eq(value).all().int64_value(&[]) == 1
    }

    /// Whether the test `name` runs in a process of its own. If not, starts one for it, since the
    /// tensors of other tests lie in the same region, and passes on its result.
    fn is_alone(name: &str) -> bool {
        const ALONE: &str = "RECTIFLOW_TEST_ALONE";
        if env::var_os(ALONE).is_some() {
            return true;
        }
        let mut test = Command::new(env::current_exe().expect("the test has a file"));
        let test = test.env(ALONE, "1").args(["--exact", "--nocapture"]);
        let path = format!("torch::allocator::tests::{name}");
        let output = test.arg(path).output().expect("it starts");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(text.contains("1 passed"), "{text}");
        false
    }

    #[test]
    fn gaps_that_meet_are_one_and_are_used_before_new_memory() {
        if !is_alone("gaps_that_meet_are_one_and_are_used_before_new_memory") {
            return;
        }
        let before = megabytes(1, 0.0);
        pack_tensors();
        let (first, second, third) = (
            megabytes(100, 1.0),
            megabytes(100, 2.0),
            megabytes(100, 3.0),
        );
        let full = reach();
        assert!(full >= 300 << 20);
        drop((first, second));
        let (wide, narrow) = (megabytes(150, 4.0), megabytes(50, 5.0));
        assert!(
            reach() < full + (100 << 20),
            "both lie where the first two lay"
        );
        drop(third);
        empty_gaps();
        assert!(
            is_all(&wide, 4.0) && is_all(&narrow, 5.0),
            "live tensors keep their values"
        );
        let last = megabytes(120, 6.0);
        assert!(reach() < full + (100 << 20), "the last gap grows");
        assert!(is_all(&last, 6.0) && is_all(&before, 0.0));
    }

    #[test]
    fn threads_do_not_get_the_same_memory() {
        pack_tensors();
        let work = |thread: i64| {
            let mut kept: Vec<(Tensor, f64)> = Vec::new();
            for round in 0..400i64 {
                let value = (thread * 1000 + round) as f64;
                let size = 1 << (12 + (round * 7 + thread) % 9);
                kept.push((
                    Tensor::full([size + round], value, (Kind::Float, Device::Cpu)),
                    value,
                ));
                if kept.len() > 8 {
                    let (tensor, value) = kept.swap_remove((round * 5 % 8) as usize);
                    assert!(is_all(&tensor, value));
                }
            }
        };
        thread::scope(|scope| (0..4).for_each(|thread| drop(scope.spawn(move || work(thread)))));
    }

    #[test]
    fn more_than_the_machine_has_is_an_error() {
        pack_tensors();
        let error = Tensor::f_empty([1 << 50], (Kind::Float, Device::Cpu)).expect_err("4 PiB");
        assert!(
            error.to_string().contains("can't allocate memory"),
            "{error}"
        );
        assert!(
            is_all(&megabytes(1, 7.0), 7.0),
            "the next allocation succeeds"
        );
    }
}
