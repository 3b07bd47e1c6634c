//! `rectiflow train --ranks N`: the ranks of a run on one machine, each a process of the same
//! command.
//!
//! The ranks detect failures among themselves and exit. This process only starts them, forwards a
//! request to stop, and reports how they ended. It asks a rank to stop by closing the rank's
//! standard input, so the ranks also stop if this process dies. Ranks have process groups of their
//! own, so Ctrl-C reaches this process alone.

use std::{
    env,
    ffi::OsString,
    net::TcpListener,
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rectiflow_train::{launch::Launch, recipe::Checked};

use crate::terminal::{answer::Answer, signals::StopSignal};

/// Environment variable set in the ranks that this process starts.
pub(crate) const STARTED: &str = "RECTIFLOW_LOCAL_RANKS";
const GLANCE: Duration = Duration::from_millis(50);
/// Time that the ranks need beyond the time-out to notice a failure and exit.
const GRACE: Duration = Duration::from_secs(20);

/// The ranks of a run, as processes.
pub(crate) struct Ranks(Vec<Rank>);

struct Rank {
    child: Child,
    status: Option<ExitStatus>,
}

/// Runs the current command with `ranks` ranks. Only rank 0 writes to standard output.
pub(crate) fn run(ranks: usize, checked: &Checked, stop: &StopSignal) -> anyhow::Result<Answer> {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let mut all = Ranks::start(&arguments, ranks, false)?;
    let failed = all.wait(checked, stop)?;
    report(&all.0, failed, stop)
}

impl Ranks {
    /// Starts `ranks` processes of this program. If `pinned`, rank r runs on core r only, by
    /// `taskset`.
    pub(crate) fn start(
        arguments: &[OsString],
        ranks: usize,
        pinned: bool,
    ) -> anyhow::Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let port = port.context("finding a free port")?.port();
        let mut all = Vec::new();
        for rank in 0..ranks {
            let mut command = command(rank, pinned)?;
            command
                .args(arguments)
                .envs(Launch::local_environment(rank, ranks, port))
                .env(STARTED, "1");
            if env::var_os("OMP_NUM_THREADS").is_none() {
                command.env("OMP_NUM_THREADS", threads(ranks, pinned).to_string());
            }
            if rank > 0 || pinned {
                command.stdout(Stdio::null());
            }
            all.push(Rank::spawn(command)?);
        }
        Ok(Self(all))
    }

    /// Waits until all ranks have ended, forwarding a request to stop. Returns the first rank that
    /// failed by itself. A rank that does not end after a failure is killed.
    pub(crate) fn wait(
        &mut self,
        checked: &Checked,
        stop: &StopSignal,
    ) -> anyhow::Result<Option<usize>> {
        let timeout = Duration::from_secs(checked.recipe.ranks.timeout_secs) + GRACE;
        let mut told = false;
        let mut failed: Option<(usize, Instant)> = None;
        while self.running().next().is_some() {
            // How ranks ended. After a request to stop, no end counts as a failure.
            for (index, rank) in self.running() {
                rank.status = rank.child.try_wait().context("asking after a rank")?;
                let unsuccessful = rank.status.is_some_and(|status| !status.success());
                if unsuccessful && failed.is_none() && !told {
                    failed = Some((index, Instant::now()));
                }
            }
            // The request to stop, forwarded once.
            if stop.signal().is_some() && !told {
                told = true;
                for rank in &mut self.0 {
                    drop(rank.child.stdin.take());
                }
            }
            // Ranks that outlive a failure.
            if failed.is_some_and(|(_, since)| since.elapsed() > timeout) {
                for (_, rank) in self.running() {
                    rank.child.kill().context("ending a rank")?;
                }
            }
            thread::sleep(GLANCE);
        }
        Ok(failed.map(|(rank, _)| rank))
    }

    /// The ranks that have not ended, with their numbers.
    fn running(&mut self) -> impl Iterator<Item = (usize, &mut Rank)> {
        let all = self.0.iter_mut().enumerate();
        all.filter(|(_, rank)| rank.status.is_none())
    }
}

impl Rank {
    fn spawn(mut command: Command) -> anyhow::Result<Self> {
        let child = command.stdin(Stdio::piped()).process_group(0).spawn();
        let child = child
            .with_context(|| format!("starting a rank: {}", command.get_program().display()))?;
        Ok(Self {
            child,
            status: None,
        })
    }
}

/// CPU threads of a rank.
fn threads(ranks: usize, pinned: bool) -> usize {
    if pinned {
        return 1;
    }
    let cores = thread::available_parallelism().map_or(1, usize::from);
    (cores / ranks).max(1)
}

fn command(rank: usize, pinned: bool) -> anyhow::Result<Command> {
    let program = env::current_exe().context("finding this program")?;
    if !pinned {
        return Ok(Command::new(program));
    }
    let core = rank % thread::available_parallelism().map_or(1, usize::from);
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &core.to_string()]).arg(program);
    Ok(command)
}

/// The answer for ranks that have ended, of which `failed` was the first to fail.
fn report(all: &[Rank], failed: Option<usize>, stop: &StopSignal) -> anyhow::Result<Answer> {
    let codes: Vec<Option<i32>> = all
        .iter()
        .map(|rank| rank.status.and_then(|status| status.code()))
        .collect();
    if let Some(code) = codes.iter().flatten().find(|code| **code == 3) {
        return Ok(Answer::of_rank_0(*code));
    }
    if let (Some(signal), None) = (stop.signal(), failed) {
        return Ok(Answer::of_rank_0(128 + signal));
    }
    let Some(rank) = failed else {
        return Ok(Answer::of_rank_0(0));
    };
    let status = all[rank].status.context("all ranks have ended")?;
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(Answer::of_rank_0(code)),
        (None, Some(signal)) => bail!("rank {rank} of {} was killed by signal {signal}", all.len()),
        (None, None) => bail!("rank {rank} of {} ended: {status}", all.len()),
    }
}
