//! Retries of a request: bounded in number and in time, with growing pauses between them.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::time::{sleep, timeout};

use crate::{
    error::{Error, Result},
    remote::{Failure, Reason, Remote, Target, network::Network},
    rng::{Purpose, Rng},
};

impl Remote {
    /// Calls `attempt` until it succeeds, fails for good, or reaches the limit of attempts or the
    /// deadline.
    pub(super) async fn retried<T, F>(
        &self,
        target: &Target<'_>,
        attempt: impl Fn() -> F,
    ) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, Failure>>,
    {
        let permit = self.permits.acquire().await;
        let _permit = permit.expect("the semaphore is never closed");
        let began = Instant::now();
        let deadline = self.network.deadline;
        let mut last = Reason::Words("the store did not answer in time".to_owned());
        let mut number = 1;
        loop {
            match timeout(deadline.saturating_sub(began.elapsed()), attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(Failure::Lasting(error))) => return Err(error),
                Ok(Err(Failure::Passing(reason))) => last = reason,
                Err(_) => break,
            }
            let pause = self.pause(number);
            if number >= self.network.attempts || began.elapsed() + pause >= deadline {
                break;
            }
            let (object, range) = (self.url_of(target.name), &target.range);
            tracing::debug!(%object, ?range, number, reason = %last, "requesting again");
            sleep(pause).await;
            number += 1;
        }
        Err(self.gave_up(target, number, began.elapsed(), last))
    }

    fn pause(&self, attempt: u32) -> Duration {
        let Network {
            pause,
            longest_pause,
            ..
        } = *self.network;
        let doublings = (attempt - 1).min(16);
        let full = pause.saturating_mul(1 << doublings).min(longest_pause);
        // A run does not depend on the pauses: they keep many readers from retrying at the same
        // moment.
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let seed = now.unwrap_or_default().as_nanos() as u64;
        let jitter = Rng::keyed(seed, Purpose::Jitter, &[u64::from(attempt)]).f64();
        full.mul_f64(1.0 - jitter / 2.0)
    }

    fn gave_up(&self, target: &Target<'_>, attempts: u32, after: Duration, last: Reason) -> Error {
        match last {
            Reason::Check(error) => error,
            Reason::Words(reason) => {
                let secs = after.as_secs_f64();
                let reason = format!("gave up after {attempts} attempts in {secs:.1} s: {reason}");
                self.error(target, attempts, reason)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::remote::Location;

    #[test]
    fn pauses_grow_and_vary_within_bounds() {
        let network = Network {
            pause: Duration::from_millis(100),
            ..Network::default()
        };
        let Ok(Location::Remote(remote)) =
            Location::parse(Path::new("http://127.0.0.1:1/x"), &network)
        else {
            panic!()
        };
        for (attempt, full) in [(1, 100), (2, 200), (4, 800), (40, 10_000)] {
            let pause = remote.pause(attempt);
            assert!(
                pause * 2 >= Duration::from_millis(full) && pause <= Duration::from_millis(full),
                "{pause:?}"
            );
        }
    }
}
