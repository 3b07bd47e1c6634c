//! Backward passes written in Rust: activation checkpointing, and gradients that are taken as soon
//! as they are complete.
//!
//! tch has no custom autograd function. `autograd.cpp` has two nodes that call a closure, behind a
//! C interface; this file is its safe side. No panic and no exception crosses the border: if a
//! closure panics, the backward pass fails with its message.
//!
//! libtorch runs a backward pass on the calling thread for a CPU, and on its own threads for a GPU.
//! So closures can be called and dropped on another thread than the one that created them.

use std::{
    any::Any,
    ffi::{c_char, c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
};

use tch::{TchError, Tensor};
use torch_sys::C_tensor;

use crate::torch::ffi::{Torch, checked};

/// Calculates `run(inputs)` without keeping its intermediate results; the backward pass calculates
/// it a second time.
///
/// `run` must do the same in every call. `parameters` are the leaves that it uses besides its
/// inputs: a leaf left out receives no gradient. If autograd records nothing, this is a plain call.
pub(crate) fn checkpoint(
    inputs: &[&Tensor],
    parameters: &[Tensor],
    run: impl Fn(&[Tensor]) -> Torch + Send + Sync + 'static,
) -> Torch {
    let closure = Closure::new(move |inputs: Vec<Tensor>| run(&inputs).map(Some));
    let inputs: Vec<_> = inputs.iter().map(|tensor| tensor.as_ptr()).collect();
    let parameters: Vec<_> = parameters.iter().map(Tensor::as_ptr).collect();
    let mut out = ptr::null_mut();
    // SAFETY: the pointers are live tensors for the whole call, and C++ creates its own references.
    let text = unsafe {
        rectiflow_checkpoint(
            closure,
            inputs.as_ptr(),
            inputs.len(),
            parameters.as_ptr(),
            parameters.len(),
            &raw mut out,
        )
    };
    checked(text)?;
    // SAFETY: without an error `out` is a tensor that this function owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Takes a leaf's gradients in place of `Tensor::grad`, for as long as the sink lives.
#[derive(Debug)]
pub struct Sink(*mut c_void);

// SAFETY: the handle is a node with an atomic reference count.
unsafe impl Send for Sink {}

impl Sink {
    /// Creates a sink: each backward pass that reaches `leaf` passes its complete gradient (of the
    /// leaf's dtype and shape) to `take`, and keeps nothing itself. A leaf has at most one sink.
    ///
    /// # Errors
    /// libtorch's error, if `leaf` is not a leaf that requires a gradient.
    pub fn new(
        leaf: &Tensor,
        take: impl Fn(Tensor) + Send + Sync + 'static,
    ) -> Result<Self, TchError> {
        let closure = Closure::new(move |gradients: Vec<Tensor>| {
            gradients.into_iter().for_each(&take);
            Ok(None)
        });
        let mut handle = ptr::null_mut();
        // SAFETY: `leaf` is a live tensor; C++ keeps no pointer to it.
        checked(unsafe { rectiflow_sink(closure, leaf.as_ptr(), &raw mut handle) })?;
        Ok(Self(handle))
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        // SAFETY: the handle came from `rectiflow_sink` and is dropped once.
        unsafe { rectiflow_drop_sink(self.0) }
    }
}

/// A closure, in C++'s form.
#[repr(C)]
struct Closure {
    data: *mut c_void,
    call: unsafe extern "C" fn(
        *mut c_void,
        *const *mut C_tensor,
        usize,
        *mut *mut C_tensor,
        *mut Failure,
    ) -> c_int,
    drop: unsafe extern "C" fn(*mut c_void),
}

/// A C++ string that receives the reason of a failure.
enum Failure {}

impl Closure {
    fn new<F: Fn(Vec<Tensor>) -> Result<Option<Tensor>, TchError> + Send + Sync + 'static>(
        act: F,
    ) -> Self {
        Self {
            data: Box::into_raw(Box::new(act)).cast(),
            call: call::<F>,
            drop: drop_closure::<F>,
        }
    }
}

/// # Safety
/// `data` is the closure `F`; `tensors` are `num_tensors` tensors whose ownership passes to this
/// function.
unsafe extern "C" fn call<F: Fn(Vec<Tensor>) -> Result<Option<Tensor>, TchError>>(
    data: *mut c_void,
    tensors: *const *mut C_tensor,
    num_tensors: usize,
    result: *mut *mut C_tensor,
    failure: *mut Failure,
) -> c_int {
    // SAFETY: the caller guarantees the conditions above.
    let (act, tensors) = unsafe {
        let tensors = (0..num_tensors)
            .map(|i| Tensor::from_ptr(*tensors.add(i)))
            .collect::<Vec<_>>();
        (&*data.cast::<F>(), tensors)
    };
    let reason = match catch_unwind(AssertUnwindSafe(|| act(tensors))) {
        Ok(Ok(None)) => return 0,
        Ok(Ok(Some(tensor))) => {
            let mut tensor = std::mem::ManuallyDrop::new(tensor);
            // SAFETY: C++ owns the tensor from here on.
            unsafe { *result = tensor.as_mut_ptr() };
            return 0;
        }
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic_text(&*panic),
    };
    // SAFETY: C++ copies the text.
    unsafe { rectiflow_fail(failure, reason.as_ptr().cast(), reason.len()) };
    1
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<String>() {
        return text.clone();
    }
    match panic.downcast_ref::<&str>() {
        Some(text) => (*text).to_owned(),
        None => "a panic".to_owned(),
    }
}

/// # Safety
/// `data` is the closure `F`, which is not used afterwards.
unsafe extern "C" fn drop_closure<F>(data: *mut c_void) {
    // SAFETY: the caller guarantees the condition above. A destructor's panic must not unwind into
    // C++.
    let closure = unsafe { Box::from_raw(data.cast::<F>()) };
    let _no_unwinding = catch_unwind(AssertUnwindSafe(move || drop(closure)));
}

unsafe extern "C" {
    fn rectiflow_fail(failure: *mut Failure, text: *const c_char, length: usize);
    fn rectiflow_checkpoint(
        closure: Closure,
        inputs: *const *const C_tensor,
        num_inputs: usize,
        parameters: *const *const C_tensor,
        num_parameters: usize,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn rectiflow_sink(
        closure: Closure,
        leaf: *const C_tensor,
        handle: *mut *mut c_void,
    ) -> *mut c_char;
    fn rectiflow_drop_sink(handle: *mut c_void);
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    use tch::{Device, Kind};

    use super::*;

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    /// Returns sin(w x), and counts the calls.
    fn counted(
        calls: &Arc<AtomicUsize>,
        weight: &Tensor,
    ) -> impl Fn(&[Tensor]) -> Torch + Send + Sync + 'static {
        let (calls, weight) = (calls.clone(), Mutex::new(weight.shallow_clone()));
        move |inputs| {
            calls.fetch_add(1, Ordering::Relaxed);
            inputs[0]
                .f_mul(&weight.lock().expect("no panic holds it"))?
                .f_sin()
        }
    }

    #[test]
    fn the_backward_pass_calculates_again_and_gives_the_same_gradients() {
        let (x, weight) = (leaf(&[0.3, -0.7]), leaf(&[1.5, 2.5]));
        let plain = Tensor::run_backward(
            &[(&x * &weight).sin().sum(Kind::Float)],
            &[&x, &weight],
            false,
            false,
        );
        let calls = Arc::new(AtomicUsize::new(0));
        let y = checkpoint(&[&x], &[weight.shallow_clone()], counted(&calls, &weight)).unwrap();
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        let loss = y.sum(Kind::Float);
        let recomputed = Tensor::f_run_backward(&[&loss], &[&x, &weight], false, false).unwrap();
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        assert!(plain.iter().zip(&recomputed).all(|(a, b)| a.equal(b)));
        assert!(
            !weight.grad().defined(),
            "only the requested gradients are calculated"
        );
    }

    #[test]
    fn a_gradient_of_a_parameter_alone_is_found() {
        let (x, weight) = (Tensor::from_slice(&[0.3f32]), leaf(&[1.5]));
        let calls = Arc::new(AtomicUsize::new(0));
        let y = checkpoint(&[&x], &[weight.shallow_clone()], counted(&calls, &weight)).unwrap();
        y.sum(Kind::Float).backward();
        let expected = 0.3 * (0.45f64).cos();
        assert!((weight.grad().double_value(&[0]) - expected).abs() < 1e-6);
        let without = tch::no_grad(|| checkpoint(&[&x], &[], counted(&calls, &weight))).unwrap();
        assert!(!without.requires_grad());
    }

    #[test]
    fn panics_and_errors_become_messages() {
        let x = leaf(&[1.0]);
        let error = checkpoint(&[&x], &[], |_| panic!("out of cheese"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("out of cheese"), "{error}");
        let second = AtomicUsize::new(0);
        let fails = move |inputs: &[Tensor]| match second.fetch_add(1, Ordering::Relaxed) {
            0 => inputs[0].f_sin(),
            _ => inputs[0].f_reshape([7]),
        };
        let error = checkpoint(&[&x], &[], fails)
            .unwrap()
            .f_backward()
            .unwrap_err()
            .to_string();
        assert!(error.contains("shape '[7]'"), "{error}");
        let frozen = Tensor::from_slice(&[1f32]);
        assert!(
            Sink::new(&frozen, drop)
                .unwrap_err()
                .to_string()
                .contains("only a leaf")
        );
    }

    #[test]
    fn a_sink_takes_each_gradient_once_complete() {
        let x = leaf(&[2.0]);
        let taken = Arc::new(Mutex::new(Vec::new()));
        let into = taken.clone();
        let sink = Sink::new(&x, move |gradient| {
            into.lock().unwrap().push(gradient.double_value(&[0]))
        })
        .unwrap();
        // Used twice, once inside a checkpoint: the one gradient is 2 x + 3.
        let recomputed = checkpoint(&[&x], &[], |inputs| inputs[0].f_mul(&inputs[0])).unwrap();
        (recomputed + &x * 3.0).sum(Kind::Float).backward();
        assert_eq!(*taken.lock().unwrap(), [7.0]);
        assert!(!x.grad().defined());
        drop(sink);
        (&x * 5.0).sum(Kind::Float).backward();
        assert_eq!(
            (taken.lock().unwrap().len(), x.grad().double_value(&[0])),
            (1, 5.0),
            "libtorch accumulates again"
        );
    }

    #[test]
    fn several_threads_at_once_get_their_own_gradients() {
        let weight = Mutex::new(leaf(&[1.5]));
        let found: Vec<f64> = std::thread::scope(|scope| {
            let weight = &weight;
            let work = |thread: i32| {
                move || {
                    let weight = weight.lock().unwrap().shallow_clone();
                    let mut sum = 0.0;
                    for _ in 0..50 {
                        let x = Tensor::full([1000], f64::from(thread), (Kind::Float, Device::Cpu))
                            .set_requires_grad(true);
                        let held = Mutex::new(weight.shallow_clone());
                        let run = move |inputs: &[Tensor]| {
                            inputs[0].f_mul(&held.lock().expect("no panic holds it"))
                        };
                        let y = checkpoint(&[&x], &[weight.shallow_clone()], run).unwrap();
                        sum +=
                            Tensor::run_backward(&[y.sum(Kind::Float)], &[&weight], false, false)
                                [0]
                            .double_value(&[0]);
                    }
                    sum
                }
            };
            let threads: Vec<_> = (1..=4).map(|thread| scope.spawn(work(thread))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(found, [50e3, 100e3, 150e3, 200e3]);
    }
}
