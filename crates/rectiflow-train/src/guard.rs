//! The guard: measurements in, verdict out. It notices a failing run within one step, before the
//! update is applied.
//!
//! ```text
//! loss, gradient norm  ->  skip      not finite, or far outside its scatter: no update, the batch
//!                                    is passed over
//!                          clip      an unusually large gradient is scaled down (ZClip,
//!                                    arXiv 2504.02507); off by default
//!                          rewind    several skips in a row, or the loss has left its lowest
//!                                    level: back to a snapshot
//!                          stop      the budget of rewinds is spent: the user must look
//!                          continue  everything else
//! ```
//!
//! This file is arithmetic on its arguments: no tensor, no clock, no file. The effects of the
//! verdicts are in `run::verdict`. The guard's state is part of a checkpoint, so that a resumed run
//! judges as an uninterrupted one would have.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Problems;

/// `[guard]`: how a run reacts to an exploding loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GuardConfig {
    /// Whether the guard acts. Without it, a loss or gradient that is not finite ends the run.
    pub enabled: bool,
    /// Updates during which the guard learns what is normal; until then it acts only on values that
    /// are not finite. Values below 2 count as 2.
    pub warmup_updates: u64,
    /// A step is not applied if its loss or its gradient norm exceeds its usual size (a running
    /// geometric mean) by more than this factor and by more than its scatter explains
    /// (`spike_chance`): with small batches both scatter widely by themselves. The square of this
    /// factor is beyond the limit whatever the scatter. Above 1.
    pub spike_ratio: f64,
    /// Accepted probability that a step of a clean run is taken for a spike. The distance of the
    /// limit from the mean follows from it and from the scatter (docs/guard.md). Above 0, at most
    /// 0.01. The default is half of one false alarm in 100,000 updates.
    pub spike_chance: f64,
    /// What a step is skipped for: `loss_and_norm`, or `loss` alone. `train.update_in_backward`
    /// requires `loss`. A gradient norm that is not finite is never applied.
    pub skip_by: SkipBy,
    /// Number of consecutive steps that were not applied after which the run is rewound. At least
    /// 1.
    pub skips_to_rewind: u32,
    /// The loss has drifted if its short mean (10 updates) exceeds the lowest long mean so far (100
    /// updates; the latter third of a younger run) by more than this factor and by more than its
    /// noise. Above 1.
    pub drift_ratio: f64,
    /// Number of consecutive updates of drift after which the run is rewound. At least 1.
    pub drift_updates: u32,
    /// Gradient norms more than this number of standard deviations above their running mean are
    /// scaled down, as ZClip does (2.5 in the paper); none leaves clipping to `train.clip_norm`.
    pub clip_z: Option<f64>,
    /// Distances of a rewind, in updates, ascending. For each distance two snapshots are kept, of
    /// 12 bytes per trained parameter each (16 with `ema`); a new one is taken when the newest is
    /// that many updates old. The first rewind goes the shortest sufficient distance, the next one
    /// further.
    pub snapshot_updates: Vec<u64>,
    /// Host memory for snapshots, in GiB, for the shortest distances. Ranks that share a run each
    /// keep their part of a snapshot; this limits each rank.
    pub snapshot_gib: f64,
    /// Disk space of each rank, below `run.dir`, in GiB, for the snapshots that do not fit into
    /// memory; training waits while one is written. Distances that do not fit here either are left
    /// out, the furthest first; if none fits, the run stops where it would be rewound.
    pub snapshot_disk_gib: f64,
    /// Factor of the learning rate after a rewind. Above 0, at most 1.
    pub rate_factor: f64,
    /// Updates without an action over which one such factor is gradually taken back, at most 2^31,
    /// or four times the distance of the rewind if that is more: a spike is over after a step, but
    /// a slow drift may recur.
    pub cooldown_updates: u64,
    /// Rewinds allowed in a run; one more stops it.
    pub max_rewinds: u32,
    /// Updates between measurements of the vital signs of the model's parts (gradient norm,
    /// `g / sqrt(v)`, update to weight ratio; losses by noise level since the last measurement); 0
    /// disables them. They are written to `metrics.jsonl` and into black boxes; a measurement costs
    /// about as much as the optimiser's update.
    pub vitals_every_updates: u64,
}

/// What a step is skipped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SkipBy {
    /// Its loss or the norm of its gradient.
    #[default]
    LossAndNorm,
    /// Its loss.
    Loss,
}

impl Default for GuardConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            warmup_updates: 50,
            spike_ratio: 10.0,
            spike_chance: 5e-6,
            skip_by: SkipBy::LossAndNorm,
            skips_to_rewind: 3,
            drift_ratio: 1.3,
            drift_updates: 10,
            clip_z: None,
            snapshot_updates: vec![5, 50, 500],
            snapshot_gib: 16.0,
            snapshot_disk_gib: 0.0,
            rate_factor: 0.5,
            cooldown_updates: 20,
            max_rewinds: 3,
            vitals_every_updates: 100,
        }
    }
}

impl GuardConfig {
    /// Returns the problems of these settings, as (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Problems::of("guard");
        problems.expect_above_1("spike_ratio", self.spike_ratio);
        problems.expect(
            "spike_chance",
            self.spike_chance > 0.0 && self.spike_chance <= 0.01,
            "above 0, at most 0.01",
            self.spike_chance,
        );
        problems.expect_above_1("drift_ratio", self.drift_ratio);
        problems.expect_at_least_1("skips_to_rewind", self.skips_to_rewind.into());
        problems.expect_at_least_1("drift_updates", self.drift_updates.into());
        problems.expect(
            "rate_factor",
            self.rate_factor > 0.0 && self.rate_factor <= 1.0,
            "above 0, at most 1",
            self.rate_factor,
        );
        problems.expect_above_0("clip_z", self.clip_z.unwrap_or(1.0));
        let fits = self.cooldown_updates <= MOST_UPDATES;
        problems.expect("cooldown_updates", fits, "0 to 2^31", self.cooldown_updates);
        self.check_snapshots(&mut problems);
        problems.into_pairs()
    }

    fn check_snapshots(&self, problems: &mut Problems) {
        problems.expect_at_least_0("snapshot_gib", self.snapshot_gib);
        problems.expect_at_least_0("snapshot_disk_gib", self.snapshot_disk_gib);
        if self.enabled && !self.distances_ascend() {
            let found = &self.snapshot_updates;
            let reason = format!(
                "expected at least one number of updates up to 2^31, each larger than the one \
                 before, found {found:?}"
            );
            problems.add("snapshot_updates", reason);
        }
    }

    /// Whether the distances of a rewind are 1 to 2^31 and ascend; there is at least one.
    fn distances_ascend(&self) -> bool {
        let back = &self.snapshot_updates;
        back.first().is_some_and(|first| *first > 0)
            && back.last().is_some_and(|last| *last <= MOST_UPDATES)
            && back.windows(2).all(|pair| pair[0] < pair[1])
    }
}

/// The measurements of a step before its update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Observation {
    /// The step's loss.
    pub loss: f64,
    /// Norm of its gradient before clipping.
    pub gradient_norm: f64,
}

/// The action to take on a step.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// Apply the update.
    Continue,
    /// Scale the gradient down to this norm and apply the update.
    Clip {
        /// Norm after scaling.
        norm: f64,
        /// The reason, for the log.
        reason: String,
    },
    /// Pass over the step without an update.
    Skip {
        /// The reason, for the log.
        reason: String,
    },
    /// Go back at least `back` updates and pass over all steps since then, this one included.
    Rewind {
        /// Number of updates.
        back: u64,
        /// The reason, for the log.
        reason: String,
    },
    /// End the run.
    Stop {
        /// The reason, for the log and the user.
        reason: String,
    },
}

/// The state of the guard.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GuardState {
    /// Running means; a rewind restores them.
    pub normal: Normal,
    /// Actions so far; a rewind does not change them.
    pub acts: Acts,
}

/// Running means over the measurements of applied steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Normal {
    updates: u64,
    #[serde(with = "number_or_text")]
    loss_short: f64,
    #[serde(with = "number_or_text")]
    loss_long: f64,
    #[serde(with = "number_or_text")]
    loss_lowest: f64,
    #[serde(with = "number_or_text")]
    loss_variance: f64,
    #[serde(with = "number_or_text")]
    norm_mean: f64,
    #[serde(with = "number_or_text")]
    norm_variance: f64,
    drifting: u32,
    /// Updates since the short mean of the loss was last within the noise of its lowest level.
    #[serde(default)]
    above: u64,
    #[serde(default)]
    loss_scatter: Scatter,
    #[serde(default)]
    norm_scatter: Scatter,
}

/// Running mean and variance of a value's natural logarithm: losses and gradient norms are products
/// of many terms and scatter by factors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Scatter {
    count: u64,
    #[serde(with = "number_or_text")]
    mean: f64,
    #[serde(with = "number_or_text")]
    variance: f64,
}

/// The guard's actions so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Acts {
    /// Number of consecutive steps that were not applied, up to now.
    pub skips_in_a_row: u32,
    /// Total number of steps that were not applied.
    pub skips: u64,
    /// Rewinds since the run began or a stop was acknowledged.
    pub rewinds: u32,
    /// Index of the distance of the next rewind, if it is due before the cooldown is over.
    escalation: u32,
    /// Updates since the last skip or rewind.
    calm: u64,
    /// Number of factors by which the rate is lowered.
    #[serde(default)]
    lowered: u32,
    /// Updates without a skip or rewind over which one of them is taken back.
    #[serde(default)]
    cooldown: u64,
    /// Factor of the learning rate.
    #[serde(with = "number_or_text")]
    pub rate: f64,
}

impl Default for Acts {
    fn default() -> Self {
        Self {
            skips_in_a_row: 0,
            skips: 0,
            rewinds: 0,
            escalation: 0,
            calm: 0,
            lowered: 0,
            cooldown: 0,
            rate: 1.0,
        }
    }
}

/// The most updates of a run, and of whatever is counted in updates: more than a run makes in
/// years, and far from an overflow.
pub(crate) const MOST_UPDATES: u64 = 1 << 31;
/// Share of the newest value in the mean gradient norm and its variance: ZClip's 1 - 0.97.
const NORM_SHARE: f64 = 0.03;
const SHORT_SHARE: f64 = 0.1;
/// Number of updates that the short mean covers.
const SHORT_UPDATES: u64 = 10;
const LONG_SHARE: f64 = 0.01;
/// The long mean of a young run covers the latter third of its updates, since the loss of a young
/// run falls fast.
const LATTER_PART: f64 = 3.0;
/// Scatter of a clean run's next logarithm, in the deviations of [`Scatter`] around its mean: one
/// in fifty is above `TAIL_START`, and the excess over it has an exponential distribution of mean
/// `TAIL_SCALE`. Fitted to the gradient norms of recorded runs (docs/guard.md), which have the
/// heavier tail; losses stay below.
const TAIL_SHARE: f64 = 0.02;
const TAIL_START: f64 = 1.9;
const TAIL_SCALE: f64 = 0.7;
/// Prior of the scatter before it is known: this deviation, with the weight of `USUAL_COUNT`
/// updates.
const USUAL_DEVIATION: f64 = 0.4;
const USUAL_COUNT: f64 = 10.0;
/// The cooldown after a rewind lasts at least this multiple of its distance.
const COOLDOWN_DISTANCES: u64 = 4;
/// The short mean drifts if it is this number of its standard deviations above the lowest long
/// mean.
const DRIFT_DEVIATIONS: f64 = 6.0;
/// It is level with the lowest long mean if it is at most this number of them above.
const LEVEL_DEVIATIONS: f64 = 2.0;

impl GuardState {
    /// Judges a step by the measurements of the steps before it, and adds its own to the running
    /// means if it will be applied.
    pub fn judge(&mut self, config: &GuardConfig, seen: Observation) -> Verdict {
        self.judge_known(config, seen.loss, Some(seen.gradient_norm))
    }

    /// Judges a step by its loss alone, before its backward pass.
    pub fn judge_loss(&mut self, config: &GuardConfig, loss: f64) -> Verdict {
        self.judge_known(config, loss, None)
    }

    /// Judges a step whose gradient is not finite, after its loss was judged and a part of it was
    /// applied: the state is lost. Goes back to the newest snapshot, then further.
    pub fn judge_half_updated(&mut self, config: &GuardConfig, reason: String) -> Verdict {
        self.acts.skips += 1;
        self.rewind(config, 0, 0, reason)
    }

    fn judge_known(&mut self, config: &GuardConfig, loss: f64, norm: Option<f64>) -> Verdict {
        if let Some(reason) = self.spike(config, loss, norm) {
            return self.skip(config, reason);
        }
        let clip = norm.and_then(|norm| self.clip(config, norm));
        let norm = clip.as_ref().map_or(norm, |(norm, _)| Some(*norm));
        self.normal.learn(loss, norm);
        if let Some(reason) = self.drift(config) {
            // The short mean lags behind the beginning of a drift by the updates that it covers.
            let beginning = self.normal.above + SHORT_UPDATES;
            return self.rewind(config, 1, beginning, reason);
        }
        self.calm_down(config);
        match clip {
            Some((norm, reason)) => Verdict::Clip { norm, reason },
            None => Verdict::Continue,
        }
    }

    /// Whether the loss drifts or steps are being skipped, so that no snapshot should be taken.
    pub fn is_suspicious(&self) -> bool {
        self.normal.drifting > 0 || self.acts.skips_in_a_row > 0
    }

    fn spike(&self, config: &GuardConfig, loss: f64, norm: Option<f64>) -> Option<String> {
        if let reason @ Some(_) = self.normal.loss_scatter.spike(config, "loss", loss) {
            return reason;
        }
        let counts = |norm: &f64| config.skip_by == SkipBy::LossAndNorm || !norm.is_finite();
        let norm = norm.filter(counts)?;
        self.normal
            .norm_scatter
            .spike(config, "gradient norm", norm)
    }

    fn skip(&mut self, config: &GuardConfig, reason: String) -> Verdict {
        self.acts.skips += 1;
        self.acts.calm = 0;
        self.acts.skips_in_a_row += 1;
        if self.acts.skips_in_a_row < config.skips_to_rewind {
            return Verdict::Skip { reason };
        }
        let reason = format!(
            "{} steps in a row cannot be applied; in the last one {reason}",
            self.acts.skips_in_a_row
        );
        self.rewind(config, 0, u64::MAX, reason)
    }

    /// Returns the norm to clip to and the reason. ZClip: a norm z > `clip_z` standard deviations
    /// above its mean becomes mean + clip_z^2 / z standard deviations.
    fn clip(&self, config: &GuardConfig, norm: f64) -> Option<(f64, String)> {
        let limit = config.clip_z?;
        let deviation = self.normal.norm_variance.sqrt();
        if self.normal.updates < config.warmup_updates.max(2) || deviation == 0.0 {
            return None;
        }
        let z = (norm - self.normal.norm_mean) / deviation;
        let clipped = self.normal.norm_mean + limit * limit / z * deviation;
        if z > limit {
            let reason =
                format!("the gradient norm {norm:.4} is {z:.1} standard deviations above its mean");
            return Some((clipped, reason));
        }
        None
    }

    fn drift(&mut self, config: &GuardConfig) -> Option<String> {
        let normal = &mut self.normal;
        if normal.updates <= config.warmup_updates {
            normal.loss_lowest = normal.loss_long;
            return None;
        }
        let deviation = normal.short_deviation();
        let drifts = normal.loss_short > config.drift_ratio * normal.loss_lowest
            && normal.loss_short > normal.loss_lowest + DRIFT_DEVIATIONS * deviation;
        let is_level = normal.loss_short <= normal.loss_lowest + LEVEL_DEVIATIONS * deviation;
        normal.above = if is_level { 0 } else { normal.above + 1 };
        normal.drifting = if drifts { normal.drifting + 1 } else { 0 };
        if normal.drifting == 0 {
            normal.loss_lowest = normal.loss_lowest.min(normal.loss_long);
        }
        if normal.drifting < config.drift_updates {
            return None;
        }
        let short = normal.loss_short;
        let lowest = normal.loss_lowest;
        Some(format!(
            "the loss has risen to {short:.4} from {lowest:.4} and stays there"
        ))
    }

    /// Rewinds, or stops if the budget of rewinds is spent. `shortest` is the index of the shortest
    /// sufficient distance for this kind of problem; its first rewind goes no further than to its
    /// `beginning`, in updates before now.
    fn rewind(
        &mut self,
        config: &GuardConfig,
        shortest: usize,
        beginning: u64,
        reason: String,
    ) -> Verdict {
        let acts = &mut self.acts;
        if acts.rewinds >= config.max_rewinds {
            return Verdict::Stop {
                reason: format!("{reason}, and all {} rewinds are spent", config.max_rewinds),
            };
        }
        let furthest = config.snapshot_updates.len() - 1;
        let which = shortest.max(acts.escalation as usize).min(furthest);
        acts.rewinds += 1;
        acts.escalation = which as u32 + 1;
        acts.lowered += 1;
        acts.rate *= config.rate_factor;
        let distance = config.snapshot_updates[which];
        acts.cooldown = config.cooldown_updates.max(COOLDOWN_DISTANCES * distance);
        acts.calm = 0;
        acts.skips_in_a_row = 0;
        let back = if which == shortest {
            distance.min(beginning)
        } else {
            distance
        };
        Verdict::Rewind { back, reason }
    }

    fn calm_down(&mut self, config: &GuardConfig) {
        let acts = &mut self.acts;
        acts.skips_in_a_row = 0;
        acts.calm += 1;
        if acts.calm >= acts.cooldown {
            acts.calm = 0;
            acts.escalation = 0;
            acts.lowered = acts.lowered.saturating_sub(1);
        }
        let back = acts.calm as f64 / acts.cooldown.max(1) as f64;
        acts.rate = if acts.lowered == 0 {
            1.0
        } else {
            config.rate_factor.powf(f64::from(acts.lowered) - back)
        };
    }
}

impl Scatter {
    fn learn(&mut self, value: f64) {
        // A loss of 0 has no logarithm.
        let logarithm = value.max(f64::MIN_POSITIVE).ln();
        self.count += 1;
        let share = NORM_SHARE.max(1.0 / self.count as f64);
        let from_mean = logarithm - self.mean;
        self.mean += share * from_mean;
        self.variance += share * (from_mean * (logarithm - self.mean) - self.variance);
    }

    /// Returns the standard deviation of the logarithm, mixed with the prior while updates are few.
    fn deviation(&self) -> f64 {
        let count = (self.count as f64).min(1.0 / NORM_SHARE);
        let usual = USUAL_COUNT * USUAL_DEVIATION * USUAL_DEVIATION;
        ((count * self.variance + usual) / (count + USUAL_COUNT)).sqrt()
    }

    /// Returns why a value is not that of a clean step; `None` if it may be.
    fn spike(&self, config: &GuardConfig, what: &str, value: f64) -> Option<String> {
        if !value.is_finite() {
            return Some(format!("the {what} is {value}"));
        }
        let mean = self.mean.exp();
        let limit = self.limit(config);
        if self.count < config.warmup_updates.max(2) || value <= limit * mean {
            return None;
        }
        let ratio = value / mean;
        Some(format!(
            "the {what} {value:.4} is {ratio:.1} times its mean {mean:.4}; the limit is {limit:.1}"
        ))
    }

    /// Returns the limit of a value as a multiple of its mean: what the scatter allows, between the
    /// configured ratio and its square.
    fn limit(&self, config: &GuardConfig) -> f64 {
        let ratio = config.spike_ratio;
        (deviations(config.spike_chance) * self.deviation())
            .exp()
            .clamp(ratio, ratio * ratio)
    }
}

/// Returns the number of deviations above the mean that a clean step's loss or gradient norm
/// exceeds with this probability, half of it each.
fn deviations(chance: f64) -> f64 {
    TAIL_START + TAIL_SCALE * (2.0 * TAIL_SHARE / chance).ln()
}

impl Normal {
    /// Returns the share of the newest value in a running mean; the first values have equal weight.
    fn share(&self, usual: f64) -> f64 {
        usual.max(1.0 / self.updates as f64)
    }

    /// Returns the standard deviation of the short mean of the loss.
    fn short_deviation(&self) -> f64 {
        (self.loss_variance * SHORT_SHARE / (2.0 - SHORT_SHARE)).sqrt()
    }

    /// Adds the measurements of a step; `norm` is `None` if it is not known yet.
    fn learn(&mut self, loss: f64, norm: Option<f64>) {
        self.updates += 1;
        self.loss_scatter.learn(loss);
        let from_short = loss - self.loss_short;
        self.loss_short += self.share(SHORT_SHARE) * from_short;
        self.loss_long +=
            LONG_SHARE.max(LATTER_PART / self.updates as f64).min(1.0) * (loss - self.loss_long);
        if self.updates > 1 {
            self.loss_variance +=
                self.share(LONG_SHARE) * (from_short * from_short - self.loss_variance);
        }
        let Some(norm) = norm else {
            return;
        };
        self.norm_scatter.learn(norm);
        let from_mean = norm - self.norm_mean;
        self.norm_mean += self.share(NORM_SHARE) * from_mean;
        if self.updates > 1 {
            self.norm_variance +=
                self.share(NORM_SHARE) * (from_mean * (norm - self.norm_mean) - self.norm_variance);
        }
    }
}

/// Floats as JSON numbers. A value that is not finite is text, since JSON has no number for it;
/// checkpoints up to format 4 hold text for every value.
mod number_or_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Stored {
        Number(f64),
        Text(String),
    }

    pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() {
            serializer.serialize_f64(*value)
        } else {
            serializer.serialize_str(&value.to_string())
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        match Stored::deserialize(deserializer)? {
            Stored::Number(value) => Ok(value),
            Stored::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use rectiflow_data::rng::{Purpose, Rng};

    use super::*;

    #[test]
    fn numbers_of_checkpoints_old_and_new_are_read_as_the_same_bits() {
        // 0.1 + 0.2 has 17 digits; the last is the one that a careless reader loses.
        for value in [0.1 + 0.2, 1e-310, f64::MAX, -0.0, f64::INFINITY] {
            let scatter = Scatter {
                count: 3,
                mean: value,
                variance: 0.5,
            };
            let new = serde_json::to_string(&scatter).unwrap();
            assert_eq!(new.contains("inf"), !value.is_finite(), "{new}");
            let old = format!(r#"{{"count": 3, "mean": "{value}", "variance": "0.5"}}"#);
            for text in [new, old] {
                let read: Scatter = serde_json::from_str(&text).unwrap();
                assert_eq!(read.mean.to_bits(), value.to_bits(), "{text}");
                assert_eq!(read.variance, 0.5);
            }
        }
        let wrong = r#"{"count": 3, "mean": "much", "variance": 0.5}"#;
        assert!(serde_json::from_str::<Scatter>(wrong).is_err());
    }

    /// Losses and norms of a healthy run: both fall, both are noisy (log-normal), the norm with
    /// heavier tails.
    struct Trace {
        rng: Rng,
        update: f64,
    }

    impl Trace {
        fn new(seed: u64) -> Self {
            Self {
                rng: Rng::keyed(seed, Purpose::Noise, &[]),
                update: 0.0,
            }
        }

        fn normal(&mut self) -> f64 {
            let (a, b) = (self.rng.f64(), self.rng.f64());
            (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()
        }
    }

    impl Iterator for Trace {
        type Item = Observation;

        fn next(&mut self) -> Option<Observation> {
            self.update += 1.0;
            let level = 0.4 + 0.6 / (1.0 + self.update / 50.0);
            let loss = level * (0.25 * self.normal()).exp();
            let gradient_norm = level * (0.4 * self.normal()).exp();
            Some(Observation {
                loss,
                gradient_norm,
            })
        }
    }

    fn after_healthy_updates(config: &GuardConfig, updates: usize) -> (GuardState, Trace) {
        let (mut guard, mut trace) = (GuardState::default(), Trace::new(1));
        for seen in trace.by_ref().take(updates) {
            assert_eq!(guard.judge(config, seen), Verdict::Continue);
        }
        (guard, trace)
    }

    const BROKEN: Observation = Observation {
        loss: f64::NAN,
        gradient_norm: f64::NAN,
    };

    #[test]
    fn clean_noisy_runs_raise_no_alarm() {
        let config = GuardConfig::default();
        for seed in 0..5 {
            let mut guard = GuardState::default();
            for (update, seen) in Trace::new(seed).take(20_000).enumerate() {
                assert_eq!(
                    guard.judge(&config, seen),
                    Verdict::Continue,
                    "seed {seed}, update {update}, {seen:?}"
                );
            }
        }
    }

    /// A run of the demo's study, from its metrics.jsonl: the tiny base, converted from eps to
    /// flow, 48,000 samples in steps of 32 (recorded 2026-11-24). A conversion begins with the
    /// highest loss, and its data are real.
    fn recorded() -> Vec<Observation> {
        let number = |text: &str| text.parse::<f64>().expect("a number");
        let lines = include_str!("../tests/golden/trace.csv").lines().skip(1);
        let pairs = lines.map(|line| line.split_once(',').expect("two numbers"));
        pairs
            .map(|(loss, norm)| Observation {
                loss: number(loss),
                gradient_norm: number(norm),
            })
            .collect()
    }

    #[test]
    fn a_recorded_run_raises_no_alarm_and_what_is_done_to_it_does() {
        let config = GuardConfig::default();
        let acts = |spoil: &dyn Fn(usize, Observation) -> Observation| -> Vec<(usize, bool)> {
            let mut guard = GuardState::default();
            let verdicts = recorded()
                .into_iter()
                .enumerate()
                .map(|(at, seen)| guard.judge(&config, spoil(at, seen)));
            let acts = verdicts
                .enumerate()
                .filter(|(_, verdict)| *verdict != Verdict::Continue);
            acts.map(|(at, verdict)| (at, matches!(verdict, Verdict::Rewind { .. })))
                .collect()
        };
        assert!(recorded().len() > 1500);
        assert_eq!(acts(&|_, seen| seen), []);
        let single = |at, seen: Observation| {
            if at % 300 == 299 {
                Observation {
                    gradient_norm: 50.0 * seen.gradient_norm,
                    ..seen
                }
            } else {
                seen
            }
        };
        assert_eq!(
            acts(&single),
            [299, 599, 899, 1199, 1499].map(|at| (at, false))
        );
        // From step 1000 on the loss grows by 1% per step.
        let drift = |at: usize, seen: Observation| {
            let loss = seen.loss * 1.01f64.powi(at.saturating_sub(1000) as i32);
            Observation { loss, ..seen }
        };
        let first = acts(&drift)[0];
        assert!(first.1 && (1030..1100).contains(&first.0), "{first:?}");
    }

    /// Clean runs in steps of 8 at a constant rate of 1e-3 (recorded 2026-11-26), by name: the
    /// demo's base on the demo's data, and the model of `tests/runs` on its coloured squares, whose
    /// gradient norms scatter by a factor of 1.6.
    fn recorded_small_batches() -> std::collections::BTreeMap<String, Vec<Observation>> {
        let mut runs = std::collections::BTreeMap::<String, Vec<Observation>>::new();
        for line in include_str!("../tests/golden/trace_small_batches.csv")
            .lines()
            .skip(1)
        {
            let [run, loss, norm] = line.split(',').collect::<Vec<_>>()[..] else {
                panic!("three columns: {line}")
            };
            let number = |text: &str| text.parse::<f64>().expect("a number");
            let seen = Observation {
                loss: number(loss),
                gradient_norm: number(norm),
            };
            runs.entry(run.to_owned()).or_default().push(seen);
        }
        runs
    }

    #[test]
    fn recorded_small_batches_raise_no_alarm_however_short_the_warm_up_is() {
        let runs = recorded_small_batches();
        assert!(runs.len() == 4 && runs.values().all(|run| run.len() == 300));
        for warmup_updates in [2, 8, 50] {
            let config = GuardConfig {
                warmup_updates,
                ..GuardConfig::default()
            };
            for (name, run) in &runs {
                let mut guard = GuardState::default();
                for (update, &seen) in run.iter().enumerate() {
                    assert_eq!(
                        guard.judge(&config, seen),
                        Verdict::Continue,
                        "{name}, update {update}, {seen:?}"
                    );
                }
                // The limit is still at most the square of the ratio.
                let bad = Observation {
                    loss: 0.4,
                    gradient_norm: 101.0 * guard.normal.norm_scatter.mean.exp(),
                };
                assert!(
                    matches!(guard.judge(&config, bad), Verdict::Skip { .. }),
                    "{name}"
                );
            }
        }
    }

    /// The gradient norms of the recorded runs that limits are fitted to
    /// (`tests/runs/clean_runs.rs`): every other run of each kind, beginning with the first run of
    /// every other kind.
    fn recorded_norms() -> Vec<Vec<f64>> {
        let (mut kinds, mut norms) = (Vec::<(&str, usize)>::new(), Vec::new());
        for line in include_str!("../tests/golden/clean_runs.txt").lines() {
            let (name, numbers) = line.split_once(": ").expect("a name");
            let (kind, _) = name.split_once(" seed ").expect("a seed");
            let number = kinds
                .iter()
                .position(|(known, _)| *known == kind)
                .unwrap_or_else(|| {
                    kinds.push((kind, 0));
                    kinds.len() - 1
                });
            kinds[number].1 += 1;
            if (number + kinds[number].1) % 2 == 1 {
                let logs = numbers
                    .split(' ')
                    .map(|pair| pair.split_once(',').expect("two numbers").1);
                norms.push(
                    logs.map(|log| (log.parse::<f64>().expect("thousandths") / 1000.0).exp())
                        .collect(),
                );
            }
        }
        norms
    }

    #[test]
    fn the_tail_of_the_scatter_is_that_of_recorded_runs() {
        let mut deviations = Vec::new();
        for run in recorded_norms() {
            let mut scatter = Scatter::default();
            for norm in run {
                if scatter.count >= 10 {
                    deviations.push((norm.ln() - scatter.mean) / scatter.deviation());
                }
                scatter.learn(norm);
            }
        }
        let above: Vec<f64> = deviations
            .iter()
            .copied()
            .filter(|deviation| *deviation > TAIL_START)
            .collect();
        let share = above.len() as f64 / deviations.len() as f64;
        let excess = above
            .iter()
            .map(|deviation| deviation - TAIL_START)
            .sum::<f64>()
            / above.len() as f64;
        assert!(deviations.len() > 3000, "{}", deviations.len());
        // Rounded up: a limit that is too wide for these runs is acceptable, one too narrow is not.
        assert!((0.5..1.05).contains(&(share / TAIL_SHARE)), "{share}");
        assert!((0.6..1.05).contains(&(excess / TAIL_SCALE)), "{excess}");
    }

    #[test]
    fn the_limit_follows_from_the_scatter_and_the_accepted_chance() {
        let scatter = Scatter {
            count: 1000,
            mean: 0.0,
            variance: 0.16,
        };
        let limit = |spike_chance| {
            scatter.limit(&GuardConfig {
                spike_chance,
                ..GuardConfig::default()
            })
        };
        // A tenth of the chance is a factor of e^(0.7 ln 10 * 0.4) further.
        assert!((limit(1e-6) / limit(1e-5) - 10f64.powf(TAIL_SCALE * 0.4)).abs() < 1e-9);
        assert_eq!(
            (limit(1e-2), limit(1e-12)),
            (10.0, 100.0),
            "never below the ratio, never above its square"
        );
    }

    #[test]
    fn single_bad_batches_are_skipped_and_nothing_else_happens() {
        let config = GuardConfig::default();
        let (mut guard, trace) = after_healthy_updates(&config, 200);
        for (update, mut seen) in trace.take(1000).enumerate() {
            let bad = update % 50 == 49;
            match update / 50 % 3 {
                _ if !bad => {}
                0 => seen.loss = f64::NAN,
                1 => seen.gradient_norm = f64::INFINITY,
                _ => seen.gradient_norm *= 1e4,
            }
            let verdict = guard.judge(&config, seen);
            assert_eq!(
                matches!(verdict, Verdict::Skip { .. }),
                bad,
                "update {update}: {verdict:?}"
            );
        }
        assert_eq!(
            (guard.acts.skips, guard.acts.rewinds, guard.acts.rate),
            (20, 0, 1.0)
        );
    }

    #[test]
    fn numbers_that_are_not_finite_are_skipped_from_the_first_step_on() {
        let verdict = GuardState::default().judge(&GuardConfig::default(), BROKEN);
        assert_eq!(
            verdict,
            Verdict::Skip {
                reason: "the loss is NaN".into()
            }
        );
    }

    #[test]
    fn a_slow_drift_is_rewound_past_its_beginning() {
        let config = GuardConfig::default();
        for growth in [1.003f64, 1.01, 1.05] {
            let (mut guard, trace) = after_healthy_updates(&config, 1000);
            let drifted = trace.enumerate().map(|(update, seen)| Observation {
                loss: seen.loss * growth.powi(update as i32 + 1),
                gradient_norm: seen.gradient_norm,
            });
            let acted = drifted
                .take(400)
                .position(|seen| match guard.judge(&config, seen) {
                    Verdict::Continue => false,
                    Verdict::Rewind { back, reason } => {
                        assert!(
                            (15..=50).contains(&back),
                            "the shortest distance is behind no drift's beginning: {back}"
                        );
                        assert!(reason.contains("has risen"), "{reason}");
                        true
                    }
                    other => panic!("{other:?}"),
                });
            let acted = acted.expect("the drift is seen");
            assert!(acted < 250, "growth {growth}: only after {acted} updates");
        }
    }

    #[test]
    fn permanent_divergence_goes_further_back_each_time_and_then_stops() {
        let config = GuardConfig::default();
        let (mut guard, _) = after_healthy_updates(&config, 100);
        let mut backs = Vec::new();
        for step in 0.. {
            match guard.judge(&config, BROKEN) {
                Verdict::Skip { .. } => {}
                Verdict::Rewind { back, .. } => backs.push(back),
                Verdict::Stop { reason } => {
                    assert!(reason.contains("all 3 rewinds are spent"), "{reason}");
                    assert_eq!(step, 11, "three steps a rewind, and three more");
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(backs, [5, 50, 500]);
        assert_eq!(guard.acts.rate, 0.125);
    }

    #[test]
    fn the_rate_comes_back_when_things_have_calmed_down() {
        let config = GuardConfig::default();
        let (mut guard, trace) = after_healthy_updates(&config, 100);
        for _ in 0..3 {
            guard.judge(&config, BROKEN);
        }
        assert_eq!((guard.acts.rewinds, guard.acts.rate), (1, 0.5));
        let rates: Vec<f64> = trace
            .take(20)
            .map(|seen| {
                guard.judge(&config, seen);
                guard.acts.rate
            })
            .collect();
        assert!(
            (rates[9] - 0.5f64.sqrt()).abs() < 1e-12 && rates.is_sorted(),
            "{rates:?}"
        );
        assert!(rates[18] < 1.0 && rates[19] == 1.0, "{rates:?}");
        // A later failure begins with the shortest distance.
        let back = (0..3).find_map(|_| match guard.judge(&config, BROKEN) {
            Verdict::Rewind { back, .. } => Some(back),
            _ => None,
        });
        assert_eq!(back, Some(5));
    }

    #[test]
    fn large_gradients_are_clipped_as_zclip_does() {
        let config = GuardConfig {
            clip_z: Some(2.5),
            ..GuardConfig::default()
        };
        let mut guard = GuardState::default();
        let see = |gradient_norm| Observation {
            loss: 1.0,
            gradient_norm,
        };
        for update in 0..2000 {
            let norm = if update % 2 == 0 { 0.9 } else { 1.1 };
            assert_eq!(guard.judge(&config, see(norm)), Verdict::Continue);
        }
        let (mean, deviation) = (guard.normal.norm_mean, guard.normal.norm_variance.sqrt());
        assert!(
            (mean - 1.0).abs() < 5e-3 && (deviation - 0.1).abs() < 2e-3,
            "{mean} {deviation}"
        );
        let Verdict::Clip { norm, reason } = guard.judge(&config, see(2.0)) else {
            panic!("not clipped")
        };
        let z = (2.0 - mean) / deviation;
        assert!(
            (norm - (mean + 6.25 / z * deviation)).abs() < 1e-12,
            "{norm}"
        );
        assert!(reason.contains("standard deviations"), "{reason}");
        // The running mean takes the clipped norm.
        assert!(guard.normal.norm_mean < mean + 0.031 * (norm - mean));
    }

    #[test]
    fn the_state_comes_back_from_json_bit_for_bit() {
        let config = GuardConfig::default();
        let (mut guard, mut trace) = after_healthy_updates(&config, 333);
        guard.judge(&config, BROKEN);
        let text = serde_json::to_string(&guard).expect("plain data");
        let mut back: GuardState = serde_json::from_str(&text).expect("what was written");
        assert_eq!(back, guard);
        let next = trace.next().expect("endless");
        assert_eq!(
            (back.judge(&config, next), back),
            (guard.judge(&config, next), guard)
        );
    }

    #[test]
    fn impossible_settings_are_named() {
        let config = GuardConfig {
            spike_ratio: 1.0,
            spike_chance: 0.0,
            drift_ratio: f64::NAN,
            skips_to_rewind: 0,
            drift_updates: 0,
            rate_factor: 0.0,
            clip_z: Some(-1.0),
            snapshot_updates: vec![50, 5],
            snapshot_disk_gib: -1.0,
            ..GuardConfig::default()
        };
        assert_eq!(config.problems().len(), 9);
        assert_eq!(GuardConfig::default().problems(), []);
    }

    #[test]
    fn by_its_loss_alone_a_step_is_judged_as_with_a_usual_norm() {
        let config = GuardConfig {
            skip_by: SkipBy::Loss,
            ..GuardConfig::default()
        };
        let [mut of_both, mut of_loss] = [GuardState::default(), GuardState::default()];
        for (update, mut seen) in Trace::new(1).take(600).enumerate() {
            match update {
                200 => seen.loss = f64::NAN,
                300 => seen.loss *= 1e4,
                400 => seen.gradient_norm *= 1e4,
                _ => {}
            }
            let verdict = of_loss.judge_loss(&config, seen.loss);
            assert_eq!(verdict, of_both.judge(&config, seen), "update {update}");
            assert_eq!(
                matches!(verdict, Verdict::Skip { .. }),
                [200, 300].contains(&update)
            );
        }
        let broken = Observation {
            gradient_norm: f64::INFINITY,
            ..Trace::new(1).next().expect("endless")
        };
        assert!(matches!(
            of_both.judge(&config, broken),
            Verdict::Skip { .. }
        ));
    }

    #[test]
    fn a_state_that_is_half_updated_goes_to_the_newest_snapshot_then_further_then_stops() {
        let config = GuardConfig::default();
        let (mut guard, mut trace) = after_healthy_updates(&config, 100);
        let mut backs = Vec::new();
        let reason = loop {
            let seen = trace.next().expect("endless");
            guard.judge_loss(&config, seen.loss);
            match guard.judge_half_updated(&config, "broken".to_owned()) {
                Verdict::Rewind { back, .. } => backs.push(back),
                Verdict::Stop { reason } => break reason,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(backs, [0, 50, 500]);
        assert!(reason.contains("all 3 rewinds are spent"), "{reason}");
        assert_eq!(guard.acts.skips, 4);
    }
}
