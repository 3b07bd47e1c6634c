//! torch's c10d as Rust values: a key-value store, a group of processes, and works to wait for.
//!
//! What is unsafe about `c10d.cpp` stays in this file. Errors are c10d's own first line; who met them, in which
//! collective and over how many bytes is added by `comm`.

use std::{
    ffi::{CString, c_char, c_int, c_void},
    ptr::{NonNull, null_mut},
    time::Duration,
};

use rectiflow_sdxl::ffi;
use tch::{TchError, Tensor};
use torch_sys::C_tensor;

/// What c10d throws, as text.
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
    fn rf_store_set(store: *mut RawStore, key: *const c_char, data: *const u8, length: usize) -> *mut c_char;
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
        opened: *mut *mut RawGroup,
    ) -> *mut c_char;
    fn rf_group_close(group: *mut RawGroup);
    fn rf_all_reduce(group: *mut RawGroup, tensor: *mut C_tensor, begun: *mut *mut RawWork) -> *mut c_char;
    fn rf_broadcast(group: *mut RawGroup, tensor: *mut C_tensor, from: c_int, begun: *mut *mut RawWork) -> *mut c_char;
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

/// Calls a function that gives the text of an error: its first line.
fn call(function: impl FnOnce() -> *mut c_char) -> Outcome<()> {
    // SAFETY: the functions of `c10d.cpp` give null or a text that is the caller's.
    unsafe { ffi::outcome(function()) }.map_err(|error| match error {
        TchError::Torch(text) => text.lines().next().unwrap_or_default().to_owned(),
        other => other.to_string(),
    })
}

/// As [`call`], of a function that makes something and gives a pointer to it.
fn make<T>(function: impl FnOnce(*mut *mut T) -> *mut c_char) -> Outcome<NonNull<T>> {
    let mut made = null_mut();
    call(|| function(&raw mut made))?;
    NonNull::new(made).ok_or_else(|| "c10d failed without a message".to_owned())
}

fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).expect("zeros have been taken out")
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// A connection to the store at which ranks meet.
#[derive(Debug)]
pub(crate) struct Store(NonNull<RawStore>);

// SAFETY: c10d locks a connection for each request.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Connects to the store at `host:port`, trying for `timeout`; serves it if `is_server`. Keys are below `prefix`.
    pub(crate) fn open(host: &str, port: u16, is_server: bool, timeout: Duration, prefix: &str) -> Outcome<Self> {
        let (host, prefix) = (c_string(host), c_string(prefix));
        // SAFETY: both texts live until the call is over.
        make(|made| unsafe { rf_store_open(host.as_ptr(), port, is_server, millis(timeout), prefix.as_ptr(), made) })
            .map(Self)
    }

    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Outcome<()> {
        let key = c_string(key);
        // SAFETY: key and value live until the call is over, the store as long as `self`.
        call(|| unsafe { rf_store_set(self.0.as_ptr(), key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// Sets a key unless somebody else has; gives what it holds then.
    pub(crate) fn set_once(&self, key: &str, value: &[u8]) -> Outcome<Vec<u8>> {
        let (key, mut found) = (c_string(key), 0);
        let data = make(|made| {
            // SAFETY: as in `set`; `found` is written before the call returns.
            unsafe { rf_store_set_once(self.0.as_ptr(), key.as_ptr(), value.as_ptr(), value.len(), &mut found, made) }
        })?;
        Ok(taken(data, found))
    }

    /// Waits for a key and gives its value.
    pub(crate) fn get(&self, key: &str, timeout: Duration) -> Outcome<Vec<u8>> {
        let (key, mut found) = (c_string(key), 0);
        // SAFETY: as in `set`; `found` is written before the call returns.
        let data =
            make(|made| unsafe { rf_store_get(self.0.as_ptr(), key.as_ptr(), millis(timeout), &mut found, made) })?;
        Ok(taken(data, found))
    }

    pub(crate) fn has(&self, key: &str) -> Outcome<bool> {
        let (key, mut has) = (c_string(key), false);
        // SAFETY: as in `set`.
        call(|| unsafe { rf_store_has(self.0.as_ptr(), key.as_ptr(), &mut has) })?;
        Ok(has)
    }
}

/// Bytes that the C++ side has allocated, as a vector.
fn taken(data: NonNull<u8>, length: usize) -> Vec<u8> {
    // SAFETY: the C++ side allocated at least `length` bytes and wrote them.
    let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr(), length) }.to_vec();
    // SAFETY: they came from malloc, and nobody else has them.
    unsafe { rf_free(data.as_ptr().cast()) };
    bytes
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: opened by us, closed once.
        unsafe { rf_store_close(self.0.as_ptr()) }
    }
}

/// Whether this build has collectives between GPUs.
pub(crate) fn has_nccl() -> bool {
    // SAFETY: it takes nothing and gives a constant.
    unsafe { rf_has_nccl() }
}

/// What carries the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// Between GPUs.
    Nccl,
    /// Between processors.
    Gloo,
}

/// Processes that make collectives together. Calls are made in the same order by all, from one thread at a time.
#[derive(Debug)]
pub(crate) struct Group(NonNull<RawGroup>);

// SAFETY: a process group queues works under a lock of its own and belongs to no thread.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    /// Joins rank `rank` of `ranks`, which meet at `store`. Gloo listens at `interface`, or else at `address`; both may
    /// be empty.
    pub(crate) fn open(
        store: &Store,
        transport: Transport,
        [rank, ranks]: [usize; 2],
        interface: &str,
        address: &str,
    ) -> Outcome<Self> {
        let (interface, address) = (c_string(interface), c_string(address));
        let (nccl, rank, ranks) = (transport == Transport::Nccl, rank as c_int, ranks as c_int);
        let open = |made| {
            // SAFETY: all texts live until the call is over; the group keeps a reference of its own to the store.
            unsafe { rf_group_open(store.0.as_ptr(), nccl, rank, ranks, interface.as_ptr(), address.as_ptr(), made) }
        };
        make(open).map(Self)
    }

    /// Sums a contiguous tensor over all ranks, in place.
    pub(crate) fn all_reduce(&self, tensor: &Tensor) -> Outcome<Work> {
        // SAFETY: the group and the tensor are valid; the work keeps a reference to the tensor.
        make(|made| unsafe { rf_all_reduce(self.0.as_ptr(), tensor.as_ptr().cast_mut(), made) }).map(Work)
    }

    /// Makes a contiguous tensor what rank `from` has.
    pub(crate) fn broadcast(&self, tensor: &Tensor, from: usize) -> Outcome<Work> {
        // SAFETY: as in `all_reduce`.
        make(|made| unsafe { rf_broadcast(self.0.as_ptr(), tensor.as_ptr().cast_mut(), from as c_int, made) }).map(Work)
    }

    /// Makes `piece` `[k]` the sum of this rank's pieces of `all` `[R k]`.
    pub(crate) fn reduce_scatter(&self, piece: &Tensor, all: &Tensor) -> Outcome<Work> {
        let (piece, all) = (piece.as_ptr().cast_mut(), all.as_ptr().cast_mut());
        // SAFETY: as in `all_reduce`.
        make(|made| unsafe { rf_reduce_scatter(self.0.as_ptr(), piece, all, made) }).map(Work)
    }

    /// Makes `all` `[R k]` the pieces `[k]` of all ranks.
    pub(crate) fn all_gather(&self, all: &Tensor, piece: &Tensor) -> Outcome<Work> {
        let (all, piece) = (all.as_ptr().cast_mut(), piece.as_ptr().cast_mut());
        // SAFETY: as in `all_reduce`.
        make(|made| unsafe { rf_all_gather(self.0.as_ptr(), all, piece, made) }).map(Work)
    }

    /// Piece r of `input` `[R k]` becomes this rank's piece of `out` `[R k]` on rank r.
    pub(crate) fn all_to_all(&self, out: &Tensor, input: &Tensor) -> Outcome<Work> {
        let (out, input) = (out.as_ptr().cast_mut(), input.as_ptr().cast_mut());
        // SAFETY: as in `all_reduce`.
        make(|made| unsafe { rf_all_to_all(self.0.as_ptr(), out, input, made) }).map(Work)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: opened by us, closed once. It waits for works in progress: a group with a work that never ends is
        // forgotten instead (`comm`).
        unsafe { rf_group_close(self.0.as_ptr()) }
    }
}

/// A collective in progress.
#[derive(Debug)]
pub(crate) struct Work(NonNull<RawWork>);

// SAFETY: a work is reference-counted, with an atomic count, and may be waited for by any thread.
unsafe impl Send for Work {}

impl Work {
    /// Waits for at most `time`; whether it is done.
    pub(crate) fn wait(&self, time: Duration) -> Outcome<bool> {
        let mut done = false;
        // SAFETY: valid as long as `self`.
        call(|| unsafe { rf_work_wait(self.0.as_ptr(), millis(time), &mut done) })?;
        Ok(done)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; c10d keeps what is still in progress.
        unsafe { rf_work_free(self.0.as_ptr()) }
    }
}
