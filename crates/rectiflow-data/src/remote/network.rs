//! Limits on the network. Pure.

use std::time::Duration;

/// How patient and how busy reading from a URL is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Requests at one time, which is also the number of connections kept. Default 16: by Little's law enough for
    /// 128 MB/s in requests of 16 MB that take two seconds. More share a line that is full already, and what is needed
    /// first comes later.
    pub concurrency: usize,
    /// Longest time to a connection. Default 10 s.
    pub connect_timeout: Duration,
    /// Longest time without a byte, to the first one included. Default 20 s.
    pub stall_timeout: Duration,
    /// Requests for the same bytes before giving up. Default 8.
    pub attempts: u32,
    /// Pause before the second request, doubled before each further one and shortened by up to half at random.
    /// Default 250 ms.
    pub pause: Duration,
    /// Longest pause. Default 10 s.
    pub longest_pause: Duration,
    /// Longest time for all attempts together. Default 180 s, well below the ten minutes after which a collective of
    /// the trainer gives up.
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
