//! Safe wrappers of torch's c10d: a key-value store, a process group, and pending works.
//!
//! All unsafe use of `c10d.cpp` is in this file. Errors are the first lines of c10d's own messages;
//! `comm` adds the rank, the collective and the number of bytes.

use std::{
    ffi::{CString, c_char, c_int, c_void},
    ptr::{NonNull, null_mut},
    time::Duration,
};

use rectiflow_sdxl::ffi;
use tch::{TchError, Tensor};
use torch_sys::C_tensor;

/// A result whose error is the text of c10d's exception.
type Outcome<T> = std::result::Result<T, String>;

#[repr(C)]
struct RawStore(c_void);
#[repr(C)]
struct RawGroup(c_void);
#[repr(C)]
struct RawWork(c_void);

unsafe extern "C" {
    fn rf_free(memory: *mut c_void);
    fn rf_store_open(
        host: *const c_char,
        port: u16,
        is_server: bool,
        timeout_ms: i64,
        prefix: *const c_char,
        opened: *mut *mut RawStore,
    ) -> *mut c_char;
    fn rf_store_close(store: *mut RawStore);
    fn rf_store_set(
        store: *mut RawStore,
        key: *const c_char,
        data: *const u8,
        length: usize,
    ) -> *mut c_char;
    fn rf_store_set_once(
        store: *mut RawStore,
        key: *const c_char,
        data: *const u8,
        length: usize,
        found_length: *mut usize,
        found: *mut *mut u8,
    ) -> *mut c_char;
    fn rf_store_get(
        store: *mut RawStore,
        key: *const c_char,
        timeout_ms: i64,
        found_length: *mut usize,
        found: *mut *mut u8,
    ) -> *mut c_char;
    fn rf_store_has(store: *mut RawStore, key: *const c_char, has: *mut bool) -> *mut c_char;
    fn rf_has_nccl() -> bool;
    fn rf_group_open(
        store: *mut RawStore,
        nccl: bool,
        rank: c_int,
        ranks: c_int,
        interface: *const c_char,
        address: *const c_char,
        timeout_ms: i64,
        opened: *mut *mut RawGroup,
    ) -> *mut c_char;
    fn rf_group_close(group: *mut RawGroup);
    fn rf_all_reduce(
        group: *mut RawGroup,
        tensor: *mut C_tensor,
        begun: *mut *mut RawWork,
    ) -> *mut c_char;
    fn rf_broadcast(
        group: *mut RawGroup,
        tensor: *mut C_tensor,
        from: c_int,
        begun: *mut *mut RawWork,
    ) -> *mut c_char;
    fn rf_reduce_scatter(
        group: *mut RawGroup,
        piece: *mut C_tensor,
        all: *mut C_tensor,
        begun: *mut *mut RawWork,
    ) -> *mut c_char;
    fn rf_all_gather(
        group: *mut RawGroup,
        all: *mut C_tensor,
        piece: *mut C_tensor,
        begun: *mut *mut RawWork,
    ) -> *mut c_char;
    fn rf_all_to_all(
        group: *mut RawGroup,
        out: *mut C_tensor,
        input: *mut C_tensor,
        begun: *mut *mut RawWork,
    ) -> *mut c_char;
    fn rf_work_wait(work: *mut RawWork, timeout_ms: i64, done: *mut bool) -> *mut c_char;
    fn rf_work_free(work: *mut RawWork);
}

/// Calls a function that returns the text of an error or null. The error is the first line of that
/// text.
fn call(function: impl FnOnce() -> *mut c_char) -> Outcome<()> {
    // SAFETY: the functions of `c10d.cpp` return null or a text that the caller owns.
    unsafe { ffi::outcome(function()) }.map_err(|error| match error {
        TchError::Torch(text) => text.lines().next().unwrap_or_default().to_owned(),
        other => other.to_string(),
    })
}

/// Like [`call`], for a function that creates an object and stores a pointer to it.
fn make<T>(function: impl FnOnce(*mut *mut T) -> *mut c_char) -> Outcome<NonNull<T>> {
    let mut made = null_mut();
    call(|| function(&raw mut made))?;
    NonNull::new(made).ok_or_else(|| "c10d failed without a message".to_owned())
}

fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).expect("zero bytes have been replaced")
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// A connection to the key-value store at which ranks meet.
#[derive(Debug)]
pub(crate) struct Store(NonNull<RawStore>);

// SAFETY: c10d locks a connection for each request.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Connects to the store at `host:port`, trying for at most `timeout`, and serves it if
    /// `is_server`. All keys get `prefix`.
    pub(crate) fn open(
        host: &str,
        port: u16,
        is_server: bool,
        timeout: Duration,
        prefix: &str,
    ) -> Outcome<Self> {
        let (host, prefix) = (c_string(host), c_string(prefix));
        // SAFETY: both texts outlive the call.
        make(|made| unsafe {
            rf_store_open(
                host.as_ptr(),
                port,
                is_server,
                millis(timeout),
                prefix.as_ptr(),
                made,
            )
        })
        .map(Self)
    }

    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Outcome<()> {
        let key = c_string(key);
        // SAFETY: key and value outlive the call; the store lives as long as `self`.
        call(|| unsafe { rf_store_set(self.0.as_ptr(), key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// Sets a key unless it is already set, and returns its value afterwards.
    pub(crate) fn set_once(&self, key: &str, value: &[u8]) -> Outcome<Vec<u8>> {
        let (key, mut found) = (c_string(key), 0);
        let data = make(|made| {
            // SAFETY: as in `set`; `found` is written before the call returns.
            unsafe {
                rf_store_set_once(
                    self.0.as_ptr(),
                    key.as_ptr(),
                    value.as_ptr(),
                    value.len(),
                    &mut found,
                    made,
                )
            }
        })?;
        Ok(taken(data, found))
    }

    /// Waits for a key for at most `timeout` and returns its value.
    pub(crate) fn get(&self, key: &str, timeout: Duration) -> Outcome<Vec<u8>> {
        let (key, mut found) = (c_string(key), 0);
        // SAFETY: as in `set`; `found` is written before the call returns.
        let data = make(|made| unsafe {
            rf_store_get(
                self.0.as_ptr(),
                key.as_ptr(),
                millis(timeout),
                &mut found,
                made,
            )
        })?;
        Ok(taken(data, found))
    }

    pub(crate) fn has(&self, key: &str) -> Outcome<bool> {
        let (key, mut has) = (c_string(key), false);
        // SAFETY: as in `set`.
        call(|| unsafe { rf_store_has(self.0.as_ptr(), key.as_ptr(), &mut has) })?;
        Ok(has)
    }
}

/// Copies bytes that the C++ side has allocated into a vector, and frees them.
fn taken(data: NonNull<u8>, length: usize) -> Vec<u8> {
    // SAFETY: the C++ side allocated at least `length` bytes and wrote them.
    let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr(), length) }.to_vec();
    // SAFETY: the bytes came from malloc, and this is the only pointer to them.
    unsafe { rf_free(data.as_ptr().cast()) };
    bytes
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: `open` created the store, and it is closed once.
        unsafe { rf_store_close(self.0.as_ptr()) }
    }
}

/// Returns whether this build has NCCL, for collectives between GPUs.
pub(crate) fn has_nccl() -> bool {
    // SAFETY: it takes no arguments and returns a constant.
    unsafe { rf_has_nccl() }
}

/// The library that transfers the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// NCCL, between GPUs.
    Nccl,
    /// Gloo, between CPUs.
    Gloo,
}

/// A group of processes that run collectives together. All must make the same calls in the same
/// order, each from one thread at a time.
#[derive(Debug)]
pub(crate) struct Group(NonNull<RawGroup>);

// SAFETY: a process group queues works under its own lock and is not tied to a thread.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    /// Joins the group as rank `rank` of `ranks`, which meet at `store` within `timeout`. Gloo
    /// listens on `interface`, or else on `address`; both may be empty.
    pub(crate) fn open(
        store: &Store,
        transport: Transport,
        [rank, ranks]: [usize; 2],
        [interface, address]: [&str; 2],
        timeout: Duration,
    ) -> Outcome<Self> {
        let (interface, address) = (c_string(interface), c_string(address));
        let (nccl, rank, ranks) = (transport == Transport::Nccl, rank as c_int, ranks as c_int);
        let open = |made| {
            // SAFETY: all texts outlive the call; the group keeps its own reference to the store.
            unsafe {
                rf_group_open(
                    store.0.as_ptr(),
                    nccl,
                    rank,
                    ranks,
                    interface.as_ptr(),
                    address.as_ptr(),
                    millis(timeout),
                    made,
                )
            }
        };
        make(open).map(Self)
    }

    /// Begins to sum a contiguous tensor over all ranks, in place.
    pub(crate) fn all_reduce(&self, tensor: &Tensor) -> Outcome<Work> {
        // SAFETY: the group and the tensor are valid; the work keeps a reference to the tensor.
        make(|made| unsafe { rf_all_reduce(self.0.as_ptr(), tensor.as_ptr().cast_mut(), made) })
            .map(Work)
    }

    /// Begins to copy a contiguous tensor of rank `from` to all ranks, in place.
    pub(crate) fn broadcast(&self, tensor: &Tensor, from: usize) -> Outcome<Work> {
        // SAFETY: as in `all_reduce`.
        make(|made| unsafe {
            rf_broadcast(
                self.0.as_ptr(),
                tensor.as_ptr().cast_mut(),
                from as c_int,
                made,
            )
        })
        .map(Work)
    }

    /// Begins to store in `piece` `[k]` this rank's piece of `all` `[R k]`, summed over all ranks.
    pub(crate) fn reduce_scatter(&self, piece: &Tensor, all: &Tensor) -> Outcome<Work> {
        let (piece, all) = (piece.as_ptr().cast_mut(), all.as_ptr().cast_mut());
        // SAFETY: as in `all_reduce`.
        make(|made| unsafe { rf_reduce_scatter(self.0.as_ptr(), piece, all, made) }).map(Work)
    }

    /// Begins to collect in `all` `[R k]` the pieces `[k]` of all ranks.
    pub(crate) fn all_gather(&self, all: &Tensor, piece: &Tensor) -> Outcome<Work> {
        let (all, piece) = (all.as_ptr().cast_mut(), piece.as_ptr().cast_mut());
        // SAFETY: as in `all_reduce`.
        make(|made| unsafe { rf_all_gather(self.0.as_ptr(), all, piece, made) }).map(Work)
    }

    /// Begins to send piece r of `input` `[R k]` to rank r, where it becomes this rank's piece of
    /// `out` `[R k]`.
    pub(crate) fn all_to_all(&self, out: &Tensor, input: &Tensor) -> Outcome<Work> {
        let (out, input) = (out.as_ptr().cast_mut(), input.as_ptr().cast_mut());
        // SAFETY: as in `all_reduce`.
        make(|made| unsafe { rf_all_to_all(self.0.as_ptr(), out, input, made) }).map(Work)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: `open` created the group, and it is closed once. Closing waits for works in
        // progress, so a group with a work that never ends is leaked instead (`comm`).
        unsafe { rf_group_close(self.0.as_ptr()) }
    }
}

/// A collective in progress.
#[derive(Debug)]
pub(crate) struct Work(NonNull<RawWork>);

// SAFETY: a work is reference-counted atomically, and any thread may wait for it.
unsafe impl Send for Work {}

impl Work {
    /// Waits for at most `time`. Returns whether the work is done.
    pub(crate) fn wait(&self, time: Duration) -> Outcome<bool> {
        let mut done = false;
        // SAFETY: the work is valid as long as `self`.
        call(|| unsafe { rf_work_wait(self.0.as_ptr(), millis(time), &mut done) })?;
        Ok(done)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: this value owns the work, and it is freed once; c10d keeps what is still in
        // progress.
        unsafe { rf_work_free(self.0.as_ptr()) }
    }
}
