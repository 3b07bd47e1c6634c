//! Who this process is among those that share a run: `[ranks]` of the recipe and the environment variables that
//! torchrun and every other launcher set. Pure: the variables come through a closure.

use std::{ops::Range, time::Duration};

use rectiflow_data::order::RankOf;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the work of an update is split over ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Sharding {
    /// Every rank keeps all of the optimiser's memory; gradients are all-reduced once a step.
    #[serde(rename = "none")]
    None,
    /// Gradients accumulate on each rank and are reduce-scattered once a step; each rank updates its part.
    #[default]
    #[serde(rename = "once")]
    Once,
    /// Gradients are reduce-scattered after every micro-batch, so that their sum is split as well.
    #[serde(rename = "each")]
    Each,
}

/// `[ranks]`: how several processes share a run. One process alone does not read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RanksConfig {
    /// `once`: masters and the optimiser's memory are split over the ranks, gradients cross the network once a step.
    /// `each`: they cross it after every micro-batch, which saves 4 bytes a parameter where memory is short. `none`:
    /// nothing is split.
    pub sharding: Sharding,
    /// Seconds that a rank may be silent, or keep the others waiting in one place, before the run stops.
    pub timeout_secs: u64,
    /// Seconds that ranks wait for each other to come up.
    pub start_secs: u64,
}

impl Default for RanksConfig {
    fn default() -> Self {
        Self { sharding: Sharding::Once, timeout_secs: 60, start_secs: 600 }
    }
}

impl RanksConfig {
    /// What is wrong with these settings: (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        for (key, value) in [("timeout_secs", self.timeout_secs), ("start_secs", self.start_secs)] {
            // A year of 64-bit milliseconds is far from overflowing anything.
            if !(1..=31_536_000).contains(&value) {
                problems.push((format!("ranks.{key}"), format!("expected 1 to 31536000, found {value}")));
            }
        }
        problems
    }

    /// How long a rank may be silent.
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_secs)
    }
}

/// This process's place among the ranks of a run, as its launcher says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Which of how many.
    pub rank: RankOf,
    /// Which of those on this machine: the GPU that it takes.
    pub local_rank: usize,
    /// All ranks on this machine, as far as the launcher says (`LOCAL_WORLD_SIZE`); this one alone if it does not.
    pub machine: Range<usize>,
    /// Where rank 0 is: host.
    pub host: String,
    /// Where rank 0 is: port of the store at which the ranks meet.
    pub port: u16,
    /// Whether the launcher itself serves that store, as torchrun does.
    pub store_is_launchers: bool,
    /// Which attempt this is, where the launcher restarts: ranks of different attempts must not meet.
    pub attempt: String,
}

/// What every launcher must set.
const VARIABLES: [&str; 5] = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"];
/// What torchrun sets besides.
const LOCAL_RANKS: &str = "LOCAL_WORLD_SIZE";

impl Launch {
    /// Reads a launcher's environment; `None` where there is none, or one process in all.
    ///
    /// # Errors
    /// [`Error::Launch`] naming the variables that are missing or cannot be.
    pub fn from_environment(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let environment = Environment { variable: &variable };
        let Some(rank) = environment.rank()? else { return Ok(None) };
        environment.check_complete()?;
        let local_rank = environment.number("LOCAL_RANK")?;
        if local_rank > rank.rank {
            return Err(refused(format!(
                "LOCAL_RANK = {local_rank} and RANK = {}: a machine's ranks follow each other",
                rank.rank
            )));
        }
        Ok(Some(Self {
            rank,
            local_rank,
            machine: environment.machine(rank, local_rank)?,
            host: environment.text("MASTER_ADDR"),
            port: environment.port()?,
            store_is_launchers: environment.text("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt: environment.text("TORCHELASTIC_RESTART_COUNT"),
        }))
    }

    /// The variables that make a process rank `rank` of `ranks` on this machine, the store at `port`.
    pub fn local_environment(rank: usize, ranks: usize, port: u16) -> Vec<(&'static str, String)> {
        let values = [rank.to_string(), ranks.to_string(), rank.to_string(), "127.0.0.1".to_owned(), port.to_string()];
        VARIABLES.into_iter().zip(values).chain([(LOCAL_RANKS, ranks.to_string())]).collect()
    }
}

/// The variables that a launcher has set.
struct Environment<'a> {
    variable: &'a dyn Fn(&str) -> Option<String>,
}

impl Environment<'_> {
    /// Which rank of how many; `None` for one process in all.
    fn rank(&self) -> Result<Option<RankOf>> {
        match self.missing(&["RANK", "WORLD_SIZE"])[..] {
            ["RANK", "WORLD_SIZE"] => return Ok(None),
            [missing] => {
                let other = if missing == "RANK" { "WORLD_SIZE" } else { "RANK" };
                let all = VARIABLES.join(", ");
                return Err(refused(format!("{other} is set and {missing} is not; set all of {all}, or none")));
            }
            _ => {}
        }
        let (rank, ranks) = (self.number("RANK")?, self.number("WORLD_SIZE")?);
        if rank >= ranks {
            return Err(refused(format!("RANK = {rank} and WORLD_SIZE = {ranks}: ranks are counted from 0")));
        }
        Ok((ranks > 1).then_some(RankOf { rank, ranks }))
    }

    fn check_complete(&self) -> Result<()> {
        let missing = self.missing(&VARIABLES);
        if missing.is_empty() {
            return Ok(());
        }
        let (missing, all) = (missing.join(", "), VARIABLES.join(", "));
        Err(refused(format!("RANK and WORLD_SIZE are set and {missing} not; set all of {all}")))
    }

    /// The ranks on this machine, as far as the launcher says.
    fn machine(&self, RankOf { rank, ranks }: RankOf, local_rank: usize) -> Result<Range<usize>> {
        if self.text(LOCAL_RANKS).is_empty() {
            return Ok(rank..rank + 1);
        }
        let first = rank - local_rank;
        let machine = first..first + self.number(LOCAL_RANKS)?;
        if machine.contains(&rank) && machine.end <= ranks {
            return Ok(machine);
        }
        Err(refused(format!(
            "{LOCAL_RANKS} = {}, LOCAL_RANK = {local_rank}, RANK = {rank} and WORLD_SIZE = {ranks}: the ranks of this \
             machine would be {} to {}",
            machine.len(),
            machine.start,
            machine.end.saturating_sub(1)
        )))
    }

    fn port(&self) -> Result<u16> {
        let port = self.text("MASTER_PORT").trim().parse().ok().filter(|port| *port > 0);
        port.ok_or_else(|| refused("MASTER_PORT: expected a port, 1 to 65535".to_owned()))
    }

    fn number(&self, name: &str) -> Result<usize> {
        let text = self.text(name);
        text.trim().parse().map_err(|_| refused(format!("{name}: expected a number, found \"{text}\"")))
    }

    /// A variable; empty where it is not set.
    fn text(&self, name: &str) -> String {
        (self.variable)(name).unwrap_or_default()
    }

    fn missing<'n>(&self, names: &[&'n str]) -> Vec<&'n str> {
        names.iter().copied().filter(|name| (self.variable)(name).is_none()).collect()
    }
}

fn refused(reason: String) -> Error {
    Error::Launch { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
        let find =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        Launch::from_environment(find)
    }

    const GOOD: [(&str, &str); 5] =
        [("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "node0"), ("MASTER_PORT", "29500")];

    #[test]
    fn no_launcher_and_one_process_are_alone() {
        assert_eq!(read(&[]).expect("fine"), None);
        assert_eq!(read(&[("MASTER_ADDR", "left over")]).expect("fine"), None);
        assert_eq!(read(&[("RANK", "0"), ("WORLD_SIZE", "1")]).expect("fine"), None);
    }

    #[test]
    fn a_launcher_says_who_is_who() {
        let launch = read(&GOOD).expect("fine").expect("one of several");
        assert_eq!((launch.rank, launch.local_rank), (RankOf { rank: 5, ranks: 8 }, 1));
        assert_eq!((launch.host.as_str(), launch.port, launch.store_is_launchers), ("node0", 29500, false));
        assert_eq!(launch.machine, 5..6);
        let torchrun =
            [("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RESTART_COUNT", "2"), ("LOCAL_WORLD_SIZE", "4")];
        let launch = read(&[&GOOD[..], &torchrun].concat()).expect("fine").expect("one of several");
        assert!(launch.store_is_launchers && launch.attempt == "2");
        assert_eq!(launch.machine, 4..8);
        let own = Launch::local_environment(1, 2, 77);
        let own: Vec<(&str, &str)> = own.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let launch = read(&own).expect("fine").expect("one of several");
        assert_eq!((launch.rank, launch.machine), (RankOf { rank: 1, ranks: 2 }, 0..2));
    }

    #[test]
    fn variables_that_do_not_fit_are_named() {
        let with = |name: &str, value: &str| {
            let changed = GOOD.map(|(known, old)| (known, if known == name { value } else { old }));
            read(&changed).expect_err("it cannot be").to_string()
        };
        let without = |name: &str| {
            let left: Vec<_> = GOOD.into_iter().filter(|(known, _)| *known != name).collect();
            read(&left).expect_err("it cannot be").to_string()
        };
        assert!(with("RANK", "8").contains("RANK = 8 and WORLD_SIZE = 8"));
        assert!(with("RANK", "x").contains("RANK: expected a number, found \"x\""));
        assert!(with("LOCAL_RANK", "6").contains("LOCAL_RANK = 6 and RANK = 5"));
        assert!(with("MASTER_PORT", "0").contains("MASTER_PORT: expected a port"));
        for (local_ranks, machine) in [("1", "4 to 4"), ("5", "4 to 8")] {
            let wrong = [&GOOD[..], &[("LOCAL_WORLD_SIZE", local_ranks)]].concat();
            let error = read(&wrong).expect_err("it cannot be").to_string();
            assert!(error.contains(&format!("LOCAL_WORLD_SIZE = {local_ranks}")) && error.contains(machine), "{error}");
        }
        assert!(without("RANK").contains("WORLD_SIZE is set and RANK is not"));
        assert!(without("MASTER_ADDR").contains("and MASTER_ADDR not"), "{}", without("MASTER_ADDR"));
    }
}
