//! `[report]`: who is told of a run while it goes on, beside `metrics.jsonl`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Problems;

/// `[report]`: other programs' files that rank 0 writes while a run goes on, and alerts. None of it
/// delays a step: what a slow disk or server does not take in time is dropped and counted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReportConfig {
    /// Formats written beside `metrics.jsonl`, each in a folder of its name in the run folder:
    /// `tensorboard` (event files), `trackio` (its database), `wandb` (a run as W&B's offline mode
    /// writes it, for `wandb sync`).
    pub to: Vec<Destination>,
    /// Who is alerted, and to what.
    pub alert: AlertConfig,
}

/// A format of another program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Destination {
    /// TensorBoard's event files.
    #[serde(rename = "tensorboard")]
    TensorBoard,
    /// trackio's database.
    Trackio,
    /// A run of W&B's offline mode.
    Wandb,
}

/// `[report.alert]`: a command or a webhook for what cannot wait until morning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AlertConfig {
    /// A program with its arguments, started once an alert without a shell; the alert is on its
    /// standard input as one JSON object, and its text in `RECTIFLOW_ALERT`.
    pub command: Vec<String>,
    /// An address that the alert is posted to as JSON, with the text as `text` (Slack, Mattermost)
    /// and as `content` (Discord). `$NAME` takes the address from an environment variable, which
    /// keeps it out of checkpoints.
    pub webhook: Option<String>,
    /// What is alerted to: `skip`, `rewind` and `stop` of the guard, `finished`, `interrupted`, an
    /// error that ends the run (`failed`), a checkpoint that could not be written (`save_failed`),
    /// a rank that keeps the others waiting (`lag`), a test loss above `test_loss_above`
    /// (`test_loss`).
    pub on: Vec<Occasion>,
    /// Test loss above which `test_loss` is alerted to, above 0.
    pub test_loss_above: Option<f64>,
    /// Relative delay of a rank above which `lag` is alerted to, above 0: 0.5 is half as long
    /// again.
    pub lag_above: f64,
    /// Least seconds between two alerts of the same kind; what happens meanwhile is counted in the
    /// next one. `stop`, `finished`, `interrupted` and `failed` are always sent.
    pub pause_secs: u64,
    /// Seconds, 1 to 600, after which a command is killed and a webhook given up.
    pub timeout_secs: u64,
}

/// What is alerted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Occasion {
    /// The guard has skipped a step.
    Skip,
    /// The guard has gone back to an earlier state.
    Rewind,
    /// The guard has stopped the run.
    Stop,
    /// All samples have been trained on.
    Finished,
    /// The run was asked to stop.
    Interrupted,
    /// The run has ended with an error.
    Failed,
    /// A checkpoint could not be written.
    SaveFailed,
    /// A rank keeps the others waiting.
    Lag,
    /// The test loss is above a limit.
    TestLoss,
}

impl Default for AlertConfig {
    fn default() -> Self {
        Self {
            command: Vec::new(),
            webhook: None,
            on: vec![
                Occasion::Rewind,
                Occasion::Stop,
                Occasion::Finished,
                Occasion::Failed,
                Occasion::SaveFailed,
                Occasion::Lag,
                Occasion::TestLoss,
            ],
            test_loss_above: None,
            lag_above: 0.5,
            pause_secs: 600,
            timeout_secs: 30,
        }
    }
}

impl AlertConfig {
    /// Whether anybody is alerted.
    pub fn is_set(&self) -> bool {
        !self.command.is_empty() || self.webhook.is_some()
    }
}

impl ReportConfig {
    /// Returns the problems of these settings, as (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Problems::of("report");
        for (index, to) in self.to.iter().enumerate() {
            if self.to[..index].contains(to) {
                problems.add("to", "expected each format once, found one twice");
            }
        }
        let mut all = problems.into_pairs();
        let mut problems = Problems::of("report.alert");
        let alert = &self.alert;
        if let Some(limit) = alert.test_loss_above {
            problems.expect_above_0("test_loss_above", limit);
        }
        problems.expect_above_0("lag_above", alert.lag_above);
        problems.expect_count("timeout_secs", alert.timeout_secs, 600);
        if alert.command.first().is_some_and(String::is_empty) {
            problems.add("command", "expected a program first, found an empty text");
        }
        if let Some(webhook) = &alert.webhook {
            let is_address = webhook.starts_with("http://") || webhook.starts_with("https://");
            let is_variable = webhook.starts_with('$') && webhook.len() > 1;
            let fits = is_address || is_variable;
            problems.expect("webhook", fits, "http://, https:// or $NAME", webhook);
        }
        all.extend(problems.into_pairs());
        all
    }
}
