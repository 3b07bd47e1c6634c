//! The place of this process among those that share a run: `[ranks]` of the recipe, and the
//! environment variables that torchrun and other launchers set. Pure: the variables are read
//! through a closure.

use std::{ops::Range, time::Duration};

use rectiflow_data::order::RankOf;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the work of an update is split over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Sharding {
    /// Every rank keeps the whole optimiser state; gradients are all-reduced once a step.
    #[serde(rename = "none")]
    None,
    /// Gradients accumulate on each rank and are reduce-scattered once a step; each rank updates
    /// its part of the parameters.
    #[default]
    #[serde(rename = "once")]
    Once,
    /// Gradients are reduce-scattered after every micro-batch, so that their sum is split too.
    #[serde(rename = "each")]
    Each,
}

/// `[ranks]`: how several processes share a run. Ignored if there is only one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RanksConfig {
    /// `once`: masters and optimiser state are split over the ranks; gradients are sent once a
    /// step. `each`: gradients are sent after every micro-batch, which saves 4 bytes a parameter if
    /// memory is short. `none`: nothing is split.
    pub sharding: Sharding,
    /// Seconds for which a rank may be silent, or keep the others waiting with one task, before the
    /// run stops.
    pub timeout_secs: u64,
    /// Seconds for which ranks wait for each other to start.
    pub start_secs: u64,
}

impl Default for RanksConfig {
    fn default() -> Self {
        Self {
            sharding: Sharding::Once,
            timeout_secs: 60,
            start_secs: 600,
        }
    }
}

impl RanksConfig {
    /// Returns the problems of these settings as (key, reason) pairs.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        for (key, value) in [
            ("timeout_secs", self.timeout_secs),
            ("start_secs", self.start_secs),
        ] {
            // At most a year, which does not overflow 64-bit milliseconds.
            if !(1..=31_536_000).contains(&value) {
                problems.push((
                    format!("ranks.{key}"),
                    format!("expected 1 to 31536000, found {value}"),
                ));
            }
        }
        problems
    }

    /// Returns the time for which a rank may be silent.
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_secs)
    }
}

/// The place of this process among the ranks of a run, as set by its launcher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// This rank and the number of ranks.
    pub rank: RankOf,
    /// Index of this rank on this machine, and of the GPU that it uses.
    pub local_rank: usize,
    /// All ranks on this machine if the launcher sets `LOCAL_WORLD_SIZE`; otherwise only this one.
    pub machine: Range<usize>,
    /// Host of rank 0.
    pub host: String,
    /// Port on that host of the store at which the ranks meet.
    pub port: u16,
    /// Whether the launcher serves that store, as torchrun does.
    pub store_is_launchers: bool,
    /// Identifier of the attempt, if the launcher restarts failed processes: ranks of different
    /// attempts must not meet.
    pub attempt: String,
}

/// Variables that every launcher must set.
const VARIABLES: [&str; 5] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
];
/// Variable that torchrun sets in addition.
const LOCAL_RANKS: &str = "LOCAL_WORLD_SIZE";

impl Launch {
    /// Reads a launcher's environment. Returns `None` if there is none, or only one process.
    ///
    /// # Errors
    /// [`Error::Launch`] that names the missing or invalid variables.
    pub fn from_environment(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let environment = Environment {
            variable: &variable,
        };
        let Some(rank) = environment.rank()? else {
            return Ok(None);
        };
        environment.check_complete()?;
        let local_rank = environment.number("LOCAL_RANK")?;
        if local_rank > rank.rank {
            return Err(refused(format!(
                "LOCAL_RANK = {local_rank} and RANK = {}: the ranks of a machine are consecutive",
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

    /// Returns the variables that make a process rank `rank` of `ranks` on this machine, with the
    /// store at `port`.
    pub fn local_environment(rank: usize, ranks: usize, port: u16) -> Vec<(&'static str, String)> {
        let values = [
            rank.to_string(),
            ranks.to_string(),
            rank.to_string(),
            "127.0.0.1".to_owned(),
            port.to_string(),
        ];
        VARIABLES
            .into_iter()
            .zip(values)
            .chain([(LOCAL_RANKS, ranks.to_string())])
            .collect()
    }
}

/// The environment that a launcher has set.
struct Environment<'a> {
    variable: &'a dyn Fn(&str) -> Option<String>,
}

impl Environment<'_> {
    /// Returns the rank and the number of ranks; `None` if there is only one process.
    fn rank(&self) -> Result<Option<RankOf>> {
        match self.missing(&["RANK", "WORLD_SIZE"])[..] {
            ["RANK", "WORLD_SIZE"] => return Ok(None),
            [missing] => {
                let other = if missing == "RANK" {
                    "WORLD_SIZE"
                } else {
                    "RANK"
                };
                let all = VARIABLES.join(", ");
                return Err(refused(format!(
                    "{other} is set and {missing} is not; set all of {all}, or none"
                )));
            }
            _ => {}
        }
        let (rank, ranks) = (self.number("RANK")?, self.number("WORLD_SIZE")?);
        if rank >= ranks {
            return Err(refused(format!(
                "RANK = {rank} and WORLD_SIZE = {ranks}: ranks are counted from 0"
            )));
        }
        Ok((ranks > 1).then_some(RankOf { rank, ranks }))
    }

    fn check_complete(&self) -> Result<()> {
        let missing = self.missing(&VARIABLES);
        if missing.is_empty() {
            return Ok(());
        }
        let (missing, all) = (missing.join(", "), VARIABLES.join(", "));
        Err(refused(format!(
            "RANK and WORLD_SIZE are set, but not {missing}; set all of {all}"
        )))
    }

    /// Returns the ranks on this machine, as set by the launcher.
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
        let port = self
            .text("MASTER_PORT")
            .trim()
            .parse()
            .ok()
            .filter(|port| *port > 0);
        port.ok_or_else(|| refused("MASTER_PORT: expected a port, 1 to 65535".to_owned()))
    }

    fn number(&self, name: &str) -> Result<usize> {
        let text = self.text(name);
        text.trim()
            .parse()
            .map_err(|_| refused(format!("{name}: expected a number, found \"{text}\"")))
    }

    /// Returns the value of a variable; empty if it is not set.
    fn text(&self, name: &str) -> String {
        (self.variable)(name).unwrap_or_default()
    }

    fn missing<'n>(&self, names: &[&'n str]) -> Vec<&'n str> {
        names
            .iter()
            .copied()
            .filter(|name| (self.variable)(name).is_none())
            .collect()
    }
}

fn refused(reason: String) -> Error {
    Error::Launch { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
        let find = |name: &str| {
            variables
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| (*value).to_owned())
        };
        Launch::from_environment(find)
    }

    const GOOD: [(&str, &str); 5] = [
        ("RANK", "5"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "29500"),
    ];

    #[test]
    fn no_launcher_and_one_process_are_alone() {
        assert_eq!(read(&[]).expect("fine"), None);
        assert_eq!(read(&[("MASTER_ADDR", "left over")]).expect("fine"), None);
        assert_eq!(
            read(&[("RANK", "0"), ("WORLD_SIZE", "1")]).expect("fine"),
            None
        );
    }

    #[test]
    fn a_launcher_says_who_is_who() {
        let launch = read(&GOOD).expect("fine").expect("one of several");
        assert_eq!(
            (launch.rank, launch.local_rank),
            (RankOf { rank: 5, ranks: 8 }, 1)
        );
        assert_eq!(
            (launch.host.as_str(), launch.port, launch.store_is_launchers),
            ("node0", 29500, false)
        );
        assert_eq!(launch.machine, 5..6);
        let torchrun = [
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_RESTART_COUNT", "2"),
            ("LOCAL_WORLD_SIZE", "4"),
        ];
        let launch = read(&[&GOOD[..], &torchrun].concat())
            .expect("fine")
            .expect("one of several");
        assert!(launch.store_is_launchers && launch.attempt == "2");
        assert_eq!(launch.machine, 4..8);
        let own = Launch::local_environment(1, 2, 77);
        let own: Vec<(&str, &str)> = own
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        let launch = read(&own).expect("fine").expect("one of several");
        assert_eq!(
            (launch.rank, launch.machine),
            (RankOf { rank: 1, ranks: 2 }, 0..2)
        );
    }

    #[test]
    fn variables_that_do_not_fit_are_named() {
        let with = |name: &str, value: &str| {
            let changed = GOOD.map(|(known, old)| (known, if known == name { value } else { old }));
            read(&changed).expect_err("it cannot be").to_string()
        };
        let without = |name: &str| {
            let left: Vec<_> = GOOD
                .into_iter()
                .filter(|(known, _)| *known != name)
                .collect();
            read(&left).expect_err("it cannot be").to_string()
        };
        assert!(with("RANK", "8").contains("RANK = 8 and WORLD_SIZE = 8"));
        assert!(with("RANK", "x").contains("RANK: expected a number, found \"x\""));
        assert!(with("LOCAL_RANK", "6").contains("LOCAL_RANK = 6 and RANK = 5"));
        assert!(with("MASTER_PORT", "0").contains("MASTER_PORT: expected a port"));
        for (local_ranks, machine) in [("1", "4 to 4"), ("5", "4 to 8")] {
            let wrong = [&GOOD[..], &[("LOCAL_WORLD_SIZE", local_ranks)]].concat();
            let error = read(&wrong).expect_err("it cannot be").to_string();
            assert!(
                error.contains(&format!("LOCAL_WORLD_SIZE = {local_ranks}"))
                    && error.contains(machine),
                "{error}"
            );
        }
        assert!(without("RANK").contains("WORLD_SIZE is set and RANK is not"));
        assert!(
            without("MASTER_ADDR").contains("but not MASTER_ADDR"),
            "{}",
            without("MASTER_ADDR")
        );
    }
}
