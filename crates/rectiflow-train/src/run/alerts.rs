//! Alerts of a run: a command and a webhook, for what cannot wait until morning.
//!
//! They run on a thread of their own, one after the other, each with a deadline. Alerts of one kind
//! keep a distance, and those in between are counted. A failed alert is a warning in the log.

use std::{
    collections::HashMap,
    env,
    io::Write,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rectiflow_data::post_json;
use serde_json::json;

use crate::{
    measure::metrics::Event,
    ranks::straggler::Slowest,
    recipe::report::{AlertConfig, Occasion},
};

/// Sends alerts.
pub(super) struct Alerts {
    config: AlertConfig,
    run: String,
    /// When the last alert of a kind was sent, and how many have been kept back since.
    last: HashMap<Occasion, (Instant, u64)>,
}

/// Alerts that a run waits for when it ends: the last one, and one that is being sent.
const AWAITED: u32 = 2;

impl Alerts {
    pub(super) fn new(config: &AlertConfig, run_dir: &Path) -> Self {
        Self {
            config: config.clone(),
            run: run_dir.display().to_string(),
            last: HashMap::new(),
        }
    }

    /// Longest time for the alerts that a run waits for when it ends.
    pub(super) fn longest(&self) -> Duration {
        // A command and a webhook.
        2 * AWAITED * self.timeout()
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.config.timeout_secs)
    }

    /// Sends the alert of an event, if there is one.
    pub(super) fn take(&mut self, event: &Event) {
        if let Some((occasion, step, text)) = alert_of(&self.config, event) {
            self.alert(occasion, Some(step), &text);
        }
    }

    /// Sends the alert of an error that ends the run.
    pub(super) fn take_failure(&mut self, reason: &str) {
        self.alert(Occasion::Failed, None, &format!("failed: {reason}"));
    }

    fn alert(&mut self, occasion: Occasion, step: Option<u64>, text: &str) {
        if !self.config.on.contains(&occasion) {
            return;
        }
        let Some(kept_back) = self.due(occasion, Instant::now()) else {
            return;
        };
        let mut text = format!("{}: {text}", self.run);
        if kept_back > 0 {
            text += &format!(" (and {kept_back} more since the last alert of this kind)");
        }
        let body = json!({
            "text": text, "content": text, "run": self.run, "occasion": occasion, "step": step,
        });
        let body = body.to_string();
        if let Err(reason) = self.run_command(&text, &body) {
            tracing::warn!("the alert's command {:?}: {reason}", self.config.command[0]);
        }
        if let Err(reason) = self.post(body) {
            tracing::warn!("the alert's webhook: {reason}");
        }
    }

    /// Returns how many alerts of this kind were kept back; `None` if this one is, too.
    fn due(&mut self, occasion: Occasion, now: Instant) -> Option<u64> {
        let pause = Duration::from_secs(self.config.pause_secs);
        if let Some((last, kept_back)) = self.last.get_mut(&occasion)
            && !is_the_end(occasion)
            && now.duration_since(*last) < pause
        {
            *kept_back += 1;
            return None;
        }
        let before = self.last.insert(occasion, (now, 0));
        Some(before.map_or(0, |(_, kept_back)| kept_back))
    }

    fn run_command(&self, text: &str, body: &str) -> Result<(), String> {
        let Some((program, arguments)) = self.config.command.split_first() else {
            return Ok(());
        };
        let child = Command::new(program)
            .args(arguments)
            .env("RECTIFLOW_ALERT", text)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        let mut child = child.map_err(|error| error.to_string())?;
        if let Some(mut input) = child.stdin.take() {
            // A pipe holds 64 KiB: a program that does not read its input delays nothing.
            let _ = input.write_all(body.as_bytes());
        }
        wait(&mut child, self.timeout())
    }

    fn post(&self, body: String) -> Result<(), String> {
        let Some(webhook) = &self.config.webhook else {
            return Ok(());
        };
        let address = match webhook.strip_prefix('$') {
            None => webhook.clone(),
            Some(name) => {
                env::var(name).map_err(|_| format!("the environment has no variable {name}"))?
            }
        };
        post_json(&address, body, self.timeout())
    }
}

/// Waits for a program, and kills it after its time.
fn wait(child: &mut Child, timeout: Duration) -> Result<(), String> {
    const LOOK: Duration = Duration::from_millis(20);
    let began = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("it ends with {status}")),
            Ok(None) if began.elapsed() < timeout => thread::sleep(LOOK),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it is killed after {} s", timeout.as_secs()));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// Whether nothing comes after it that could be counted in the next alert.
fn is_the_end(occasion: Occasion) -> bool {
    matches!(
        occasion,
        Occasion::Stop | Occasion::Finished | Occasion::Interrupted | Occasion::Failed
    )
}

/// Returns what an event is alerted to as, with its step and in words.
fn alert_of(config: &AlertConfig, event: &Event) -> Option<(Occasion, u64, String)> {
    match event {
        Event::Guard(act) => {
            let occasion = match act.action.as_str() {
                "skip" => Occasion::Skip,
                "rewind" => Occasion::Rewind,
                "stop" => Occasion::Stop,
                _ => return None,
            };
            let text = format!(
                "the guard's {} at step {}: {}",
                act.action, act.step, act.reason
            );
            Some((occasion, act.step, text))
        }
        Event::End { step, reason, .. } => {
            let occasion = match reason.as_str() {
                "finished" => Occasion::Finished,
                "interrupted" => Occasion::Interrupted,
                _ => return None,
            };
            Some((occasion, *step, format!("{reason} at step {step}")))
        }
        Event::SaveFailed { step, reason } => {
            let text = format!("the checkpoint of step {step} could not be written: {reason}");
            Some((Occasion::SaveFailed, *step, text))
        }
        Event::Step(step) => {
            let Slowest { rank, lag } = step.ranks.as_ref()?.slowest?;
            let percent = 100.0 * lag;
            let text = format!(
                "rank {rank} takes {percent:.0} % longer at step {}",
                step.step
            );
            (lag > config.lag_above).then_some((Occasion::Lag, step.step, text))
        }
        Event::Test(test) => {
            let limit = config.test_loss_above?;
            let text = format!("the test loss is {} at step {}", test.loss, test.step);
            // NaN is above every limit.
            let is_fine = test.loss <= limit;
            (!is_fine).then_some((Occasion::TestLoss, test.step, text))
        }
        Event::Start(_) | Event::Checkpoint { .. } | Event::Vitals(_) | Event::Preview { .. } => {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::measure::metrics::{GuardEvent, TestMetrics};

    use super::*;

    fn guard(action: &str) -> Event {
        Event::Guard(GuardEvent {
            step: 7,
            action: action.to_owned(),
            reason: "the loss is \"9\"; $(touch x)".to_owned(),
            update: 6,
            black_box: None,
        })
    }

    fn config(command: &[&str]) -> AlertConfig {
        AlertConfig {
            command: command.iter().map(|&word| word.to_owned()).collect(),
            ..AlertConfig::default()
        }
    }

    #[test]
    fn a_command_gets_the_alert_as_json_and_as_text_and_no_shell_reads_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("alerts");
        let script = format!(
            "cat >>'{0}'; printf '\\n%s\\n' \"$RECTIFLOW_ALERT\" >>'{0}'",
            path.display()
        );
        let mut alerts = Alerts::new(&config(&["sh", "-c", &script]), Path::new("runs/a"));
        alerts.take(&guard("clip"));
        alerts.take(&guard("skip"));
        alerts.take(&guard("rewind"));
        alerts.take(&guard("rewind"));
        let text = fs::read_to_string(path).expect("the command has run");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        let body: serde_json::Value = serde_json::from_str(lines[0]).expect("JSON");
        assert_eq!(body["occasion"], "rewind");
        assert_eq!(body["step"], 7);
        assert_eq!(
            lines[1],
            "runs/a: the guard's rewind at step 7: the loss is \"9\"; $(touch x)"
        );
    }

    #[test]
    fn alerts_of_a_kind_keep_their_distance_and_are_counted() {
        let mut alerts = Alerts::new(&config(&["true"]), Path::new("run"));
        let now = Instant::now();
        let later = now + Duration::from_secs(601);
        assert_eq!(alerts.due(Occasion::Lag, now), Some(0));
        assert_eq!(alerts.due(Occasion::Lag, now), None);
        assert_eq!(alerts.due(Occasion::Lag, now), None);
        assert_eq!(alerts.due(Occasion::Rewind, now), Some(0));
        assert_eq!(alerts.due(Occasion::Lag, later), Some(2));
        assert_eq!(alerts.due(Occasion::Finished, now), Some(0));
        assert_eq!(alerts.due(Occasion::Finished, now), Some(0));
    }

    #[test]
    fn a_command_that_hangs_is_killed_and_one_that_is_missing_is_named() {
        let mut hangs = config(&["sleep", "60"]);
        hangs.timeout_secs = 1;
        let alerts = Alerts::new(&hangs, Path::new("run"));
        let began = Instant::now();
        let reason = alerts.run_command("text", "{}").expect_err("it is killed");
        assert!(reason.contains("killed after 1 s"), "{reason}");
        assert!(began.elapsed() < Duration::from_secs(30));
        let missing = Alerts::new(&config(&["/no/such/program"]), Path::new("run"));
        assert!(missing.run_command("text", "{}").is_err());
        let fails = Alerts::new(&config(&["false"]), Path::new("run"));
        assert!(fails.run_command("text", "{}").is_err());
    }

    #[test]
    fn a_test_loss_above_its_limit_is_alerted_to_and_so_is_nan() {
        let mut config = config(&["true"]);
        config.test_loss_above = Some(0.5);
        let found = |loss| {
            let test = Event::Test(TestMetrics {
                step: 3,
                samples: 24,
                loss,
                bins: Vec::new(),
                training: None,
                ema: None,
                ema_training: None,
                secs: 1.0,
            });
            alert_of(&config, &test).is_some()
        };
        assert!(!found(0.5) && found(0.51) && found(f64::NAN));
    }

    #[test]
    fn a_webhook_from_a_variable_that_is_missing_is_named() {
        let mut config = config(&[]);
        config.webhook = Some("$RECTIFLOW_NO_SUCH_VARIABLE".to_owned());
        let alerts = Alerts::new(&config, Path::new("run"));
        let reason = alerts.post("{}".to_owned()).expect_err("it is missing");
        assert!(reason.contains("RECTIFLOW_NO_SUCH_VARIABLE"), "{reason}");
    }
}
