//! Recorded clean runs, and endless traces that are like them.
//!
//! A trace has the course of a recorded run (its local mean, and its last level from the run's end
//! on) and scatters around it as runs of the same kind did: recorded residuals of the logarithms,
//! loss and norm together, in blocks of 10 to 40 updates, so that their tails and their
//! autocorrelation are those that were recorded. Recorded and keyed random numbers only: what is
//! judged is the same on every machine.

use rectiflow_data::rng::{Purpose, Rng};
use rectiflow_train::guard::{GuardConfig, GuardState, Observation, Verdict};

/// The file that `scripts/guard_runs.py` writes. These runs are of an Intel processor.
const RECORDED: &str = include_str!("../golden/clean_runs.txt");
/// Runs of an AMD processor, recorded after the limits were set.
const RECORDED_LATER: &str = include_str!("../golden/clean_runs_amd.txt");
/// Updates on each side in the local mean.
const AROUND: usize = 10;
/// Updates of a trace.
pub(crate) const TRACE: usize = 500;

/// The natural logarithms of a step's loss and gradient norm.
type Logs = [f64; 2];

/// A clean run.
#[derive(Debug)]
pub(crate) struct CleanRun {
    /// The settings of the run without its seed.
    pub(crate) kind: String,
    pub(crate) seed: u64,
    logs: Vec<Logs>,
}

impl CleanRun {
    fn parse(line: &str) -> Self {
        let (name, numbers) = line.split_once(": ").expect("a name");
        let (kind, seed) = name.split_once(" seed ").expect("a seed");
        let log = |text: &str| text.parse::<f64>().expect("thousandths") / 1000.0;
        let pairs = numbers
            .split(' ')
            .map(|pair| pair.split_once(',').expect("two numbers"));
        let logs = pairs.map(|(loss, norm)| [log(loss), log(norm)]).collect();
        Self {
            kind: kind.to_owned(),
            seed: seed.parse().expect("a seed"),
            logs,
        }
    }

    /// The numbers that the guard judged.
    pub(crate) fn observations(&self) -> impl Iterator<Item = Observation> {
        self.logs.iter().map(|logs| observation(*logs))
    }

    /// The mean of the logarithms over the updates around `at`, the same number before and after.
    fn level(&self, at: usize) -> Logs {
        let around = AROUND.min(at).min(self.logs.len() - 1 - at);
        let near = &self.logs[at - around..=at + around];
        [0, 1].map(|which| near.iter().map(|logs| logs[which]).sum::<f64>() / near.len() as f64)
    }

    /// The logarithms minus their local mean, where that has both sides.
    fn residuals(&self) -> Vec<Logs> {
        // The value itself is part of its local mean.
        let own = (2 * AROUND + 1) as f64 / (2 * AROUND) as f64;
        let inner = AROUND..self.logs.len() - AROUND;
        inner
            .map(|at| (self.logs[at], self.level(at)))
            .map(|(x, m)| [own * (x[0] - m[0]), own * (x[1] - m[1])])
            .collect()
    }
}

fn observation([loss, norm]: Logs) -> Observation {
    Observation {
        loss: loss.exp(),
        gradient_norm: norm.exp(),
    }
}

/// A half of the recorded runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    /// The limits were fitted to them.
    Fitted,
    /// Nothing was fitted to them.
    HeldOut,
}

/// The recorded runs of a half. Of the first runs it is every other one of each kind, starting
/// alternately with the first and the second; all later ones are held out.
pub(crate) fn recorded(half: Half) -> Vec<CleanRun> {
    let mut known: Vec<(String, u64)> = Vec::new();
    let mut chosen = Vec::new();
    for run in RECORDED.lines().map(CleanRun::parse) {
        let number = match known.iter().position(|(kind, _)| *kind == run.kind) {
            Some(number) => number,
            None => {
                known.push((run.kind.clone(), 0));
                known.len() - 1
            }
        };
        let before = &mut known[number].1;
        let is_held_out = (number as u64 + *before) % 2 == 1;
        *before += 1;
        if is_held_out == (half == Half::HeldOut) {
            chosen.push(run);
        }
    }
    if half == Half::HeldOut {
        chosen.extend(RECORDED_LATER.lines().map(CleanRun::parse));
    }
    chosen
}

/// Generates traces.
pub(crate) struct Traces {
    kinds: Vec<Kind>,
}

/// The runs of one kind.
struct Kind {
    levels: Vec<Vec<Logs>>,
    residuals: Vec<Vec<Logs>>,
}

impl Traces {
    pub(crate) fn like(runs: &[CleanRun]) -> Self {
        let mut names: Vec<&str> = runs.iter().map(|run| run.kind.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let kind = |name: &&str| {
            let of_kind = || runs.iter().filter(|run| run.kind == **name);
            Kind {
                levels: of_kind()
                    .map(|run| (0..run.logs.len()).map(|at| run.level(at)).collect())
                    .collect(),
                residuals: of_kind().map(CleanRun::residuals).collect(),
            }
        };
        Self {
            kinds: names.iter().map(kind).collect(),
        }
    }

    /// Trace `number`, of `TRACE` updates.
    pub(crate) fn trace(&self, number: u64) -> Vec<Observation> {
        let mut rng = Rng::keyed(number, Purpose::Noise, &[15]);
        let kind = pick(&self.kinds, &mut rng);
        let levels = pick(&kind.levels, &mut rng);
        let mut trace = Vec::with_capacity(TRACE);
        while trace.len() < TRACE {
            let residuals = pick(&kind.residuals, &mut rng);
            let length = 10 + rng.below(31) as usize;
            let start = rng.below((residuals.len() - length) as u64) as usize;
            for residual in &residuals[start..start + length] {
                let level = levels[trace.len().min(levels.len() - 1 - AROUND)];
                trace.push(observation([
                    level[0] + residual[0],
                    level[1] + residual[1],
                ]));
            }
        }
        trace.truncate(TRACE);
        trace
    }
}

fn pick<'a, T>(items: &'a [T], rng: &mut Rng) -> &'a T {
    &items[rng.below(items.len() as u64) as usize]
}

/// The update of the guard's first act, if it acts.
pub(crate) fn first_act(
    config: &GuardConfig,
    seen: impl IntoIterator<Item = Observation>,
) -> Option<usize> {
    let mut guard = GuardState::default();
    seen.into_iter()
        .position(|seen| guard.judge(config, seen) != Verdict::Continue)
}

/// The number of the guard's acts in a run, which continues after each act.
pub(crate) fn acts(config: &GuardConfig, seen: impl IntoIterator<Item = Observation>) -> usize {
    let mut guard = GuardState::default();
    seen.into_iter()
        .filter(|seen| guard.judge(config, *seen) != Verdict::Continue)
        .count()
}
