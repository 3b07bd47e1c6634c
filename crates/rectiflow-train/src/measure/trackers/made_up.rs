//! Events of runs that never were, for the tests of all trackers.

use crate::measure::metrics::Event;

pub(super) fn event(text: &str) -> Event {
    serde_json::from_str(text).expect("an event")
}

pub(super) fn start(step: u64) -> Event {
    event(&format!(
        r#"{{"event":"start","step":{step},"unix_secs":1795639471,"order_hash":"7","num_parameters":1,
        "num_train":1,"num_test":1,"buckets":[],"threads":1}}"#
    ))
}

/// A step whose gradient norm is not finite.
pub(super) fn step(step: u64, loss: f64) -> Event {
    event(&format!(
        r#"{{"event":"step","step":{step},"samples":8,"epoch":0,"loss":{loss:?},
        "gradient_norm":"NaN","lr":1e-4,"secs":1.0,"data_secs":0.1}}"#
    ))
}
