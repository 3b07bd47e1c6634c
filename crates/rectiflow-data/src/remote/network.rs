//! Limits on the network. Pure.

use std::time::Duration;

/// Concurrency, timeouts and retries of reads from a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Concurrent requests, and connections kept open. Default 16: by Little's law enough for 128
    /// MB/s in requests of 16 MB that take two seconds. More requests share a line that is full
    /// already, which delays the bytes that are needed first.
    pub concurrency: usize,
    /// Longest time to connect. Default 10 s.
    pub connect_timeout: Duration,
    /// Longest time without a byte, including the first one. Default 20 s.
    pub stall_timeout: Duration,
    /// Attempts at a request. Default 8.
    pub attempts: u32,
    /// Pause before the second attempt, doubled before each further one and shortened by up to half
    /// at random. Default 250 ms.
    pub pause: Duration,
    /// Longest pause. Default 10 s.
    pub longest_pause: Duration,
    /// Longest time for all attempts together. Default 180 s, well below the ten minutes after
    /// which a collective of the trainer fails.
    pub deadline: Duration,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            concurrency: 16,
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(20),
            attempts: 8,
            pause: Duration::from_millis(250),
            longest_pause: Duration::from_secs(10),
            deadline: Duration::from_secs(180),
        }
    }
}
