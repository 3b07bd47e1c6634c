//! What a run opens before its first step, the same on all ranks: the folder and its lock, the
//! data, the model, the state.
//!
//! Rank 0 does what only one process may do and sends the others the result. That all ranks have
//! the same recipe, program, data and order is checked before training begins.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File, TryLockError},
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use rectiflow_data::{batch::Source, dataset::Dataset, loader::Loader, manifest::Split};
use rectiflow_sdxl::{
    gpu,
    model::{Component, Model, config_of},
};
use tch::Device;

use crate::{
    checkpoint::{
        Checkpoints, Frozen, Saved, Trained, adopt, components::Components, mirror::worker::Mirror,
        sums::hash_file,
    },
    error::{Error, Result},
    guard::GuardState,
    measure::metrics::Start,
    ranks::{comm::Comm, exchange::share, launch::Launch},
    recipe::{Checked, Recipe, changes::changes},
    run::{origin::Origin, stop_file},
    state::{Position, TrainState, flat::FlatParameters, optim::Optimizer, tensor_norms::NormMean},
};

/// The parts of a run that stay constant.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub(crate) checked: &'a Checked,
    pub(crate) comm: &'a Comm,
    pub(crate) checkpoints: &'a Checkpoints,
    pub(crate) origin: &'a Origin,
    pub(crate) sources: &'a [Source],
    pub(crate) components: &'a Components,
    pub(crate) model: &'a Model,
    pub(crate) trained: &'a [Trained],
    /// The copy of the run, kept by rank 0.
    pub(crate) mirror: Option<&'a Mirror>,
}

/// Returns the recipe for this rank: `cuda` becomes the GPU with the rank's number on this machine.
///
/// # Errors
/// [`Error::Launch`] if the machine has fewer GPUs than ranks.
pub(crate) fn for_rank(checked: &Checked, launch: Option<&Launch>) -> Result<Checked> {
    let mut checked = checked.clone();
    let (Some(launch), "cuda") = (launch, checked.recipe.run.device.as_str()) else {
        return Ok(checked);
    };
    let index = launch.local_rank;
    if let Some(reason) = gpu::why_not(index) {
        let reason = format!("LOCAL_RANK {index} needs the GPU cuda:{index}: {reason}");
        return Err(Error::Launch { reason });
    }
    checked.device = Device::Cuda(index);
    Ok(checked)
}

/// Opens the run folder; `when_locked` is called before the folder is asked for a stop. Returns the
/// lock, held by rank 0, and the reason of a stop that is acknowledged.
///
/// # Errors
/// [`Error::Locked`], [`Error::Stopped`], [`Error::Io`]; [`Error::Launch`] if the ranks do not see
/// the same folder; those of `when_locked`.
pub(crate) fn open_folder(
    run_dir: &Path,
    comm: &Comm,
    acknowledge: bool,
    when_locked: impl FnOnce() -> Result<()>,
) -> Result<(Option<File>, Option<String>)> {
    let mut file = None;
    let acknowledged = comm.first(|| {
        fs::create_dir_all(run_dir).map_err(Error::io(run_dir))?;
        file = Some(lock(run_dir)?);
        when_locked()?;
        stop_file::check(run_dir, acknowledge)
    })?;
    let seen = if run_dir.join(LOCK).is_file() {
        Ok(())
    } else {
        let rank = comm.rank().rank;
        let run_dir = run_dir.display();
        let reason = format!(
            "rank {rank} does not see the folder {run_dir} of rank 0: run.dir must be on storage \
             that all ranks share"
        );
        Err(Error::Launch { reason })
    };
    comm.all_could(seen)?;
    Ok((file, acknowledged))
}

/// Checks that all ranks have the recipe and the program of rank 0.
///
/// # Errors
/// [`Error::Launch`] naming what differs.
pub(crate) fn check_same_start(comm: &Comm, recipe: &Recipe) -> Result<()> {
    let own = recipe.to_toml();
    let program = if comm.rank().ranks == 1 {
        String::new()
    } else {
        program_identity()?
    };
    let recipes = comm.gather_texts(&own)?;
    let programs = comm.gather_texts(&program)?;
    let mut differing = Vec::new();
    if recipes[0] != own {
        let changes = changes(&recipes[0], recipe).map_err(|reason| Error::Launch { reason })?;
        for change in changes {
            if !change.is_of_machine() {
                differing.push(change.line);
            }
        }
    }
    if programs[0] != program {
        differing.push(format!("the program: {} -> {program}", programs[0]));
    }
    comm.all_could(check_none_differs(comm, &differing))
}

/// Fails if this rank differs from rank 0 in anything.
fn check_none_differs(comm: &Comm, differing: &[String]) -> Result<()> {
    if differing.is_empty() {
        return Ok(());
    }
    let rank = comm.rank().rank;
    let reason = format!(
        "rank {rank} differs from rank 0 in {}; give all ranks the same",
        differing.join(", ")
    );
    Err(Error::Launch { reason })
}

/// Checks that all ranks have the data sets and the order of rank 0.
///
/// # Errors
/// [`Error::Launch`] naming what differs.
pub(crate) fn check_same_data(comm: &Comm, sources: &[Source], order_hash: &str) -> Result<()> {
    let mut differing = Vec::new();
    for (index, own) in identities(sources).iter().enumerate() {
        let all = comm.gather_texts(own)?;
        if all[0] != *own {
            differing.push(format!("data[{index}]: {} -> {own}", all[0]));
        }
    }
    let orders = comm.gather_texts(order_hash)?;
    if orders[0] != order_hash {
        differing.push(format!(
            "the order of samples: {} -> {order_hash}",
            orders[0]
        ));
    }
    comm.all_could(check_none_differs(comm, &differing))
}

/// Returns the identities of the data sets.
fn identities(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::with_capacity(sources.len());
    for source in sources {
        found.push(source.dataset.identity());
    }
    found
}

const LOCK: &str = "lock";

/// Locks the run folder against a second trainer. The lock lasts as long as the file is open; the
/// system releases it when the process ends, however it ends.
fn lock(run_dir: &Path) -> Result<File> {
    let path = run_dir.join(LOCK);
    let file = File::create(&path).map_err(Error::io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked {
            path: run_dir.to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(Error::Io { path, source }),
    }
}

pub(crate) fn open_sources(checked: &Checked) -> Result<Vec<Source>> {
    let cache = checked.recipe.run.open_cache()?;
    let mut sources = Vec::new();
    for (data, amount) in checked.recipe.data.iter().zip(&checked.amounts) {
        let mut dataset = Dataset::open(&data.path)?;
        if let Some(cache) = &cache {
            dataset = dataset.with_cache(cache);
        }
        sources.push(Source {
            dataset: Arc::new(dataset),
            prompt: data.prompt.clone(),
            amount: *amount,
        });
    }
    Ok(sources)
}

/// Checks that the data sets were encoded with the model's VAE: latents of another one would train
/// without an error and decode to noise.
pub(crate) fn check_vae(checked: &Checked, base: &Components, sources: &[Source]) -> Result<()> {
    let found = base.blake3(Component::Vae)?;
    for (data, source) in checked.recipe.data.iter().zip(sources) {
        let codec = &source.dataset.manifest().codec;
        if codec.hash != found {
            let reason = format!(
                "its latents were made by the VAE {} (BLAKE3 {}), but the model's VAE {} has \
                 BLAKE3 {found}; prepare the data set with this VAE or choose a \
                 model with the other one",
                codec.vae,
                codec.hash,
                base.folder(Component::Vae).display()
            );
            return Err(Error::checkpoint(&data.path, reason));
        }
    }
    Ok(())
}

fn trained_components(checked: &Checked) -> impl Iterator<Item = Component> {
    Component::ALL
        .into_iter()
        .filter(|&component| checked.recipe.train.trains(component))
}

/// Returns the trained components with their configuration files.
pub(crate) fn find_trained(checked: &Checked, components: &Components) -> Result<Vec<Trained>> {
    let mut found = Vec::new();
    for component in trained_components(checked) {
        let place = components.folder(component);
        let config = if place.is_file() {
            let (config, _) = config_of(component, place)?;
            serde_json::to_vec_pretty(&config).expect("a JSON value serialises")
        } else {
            let path = place.join("config.json");
            fs::read(&path).map_err(Error::io(&path))?
        };
        found.push(Trained { component, config });
    }
    Ok(found)
}

/// Returns the state before the first step, from the model's weights: the part that this rank
/// keeps.
pub(crate) fn fresh_state(checked: &Checked, model: &Model, comm: &Comm) -> TrainState {
    let parameters = adopt::apply(checked, model, share(comm, checked.recipe.ranks.sharding));
    let average = if checked.recipe.ema.half_life_samples.is_some() {
        Some(parameters.masters.to_tensor())
    } else {
        None
    };
    TrainState {
        position: Position::default(),
        optimizer: Optimizer::of(checked.recipe.optimizer.clone(), &parameters),
        moments_from: vec![0; parameters.groups.len()],
        average,
        tensor_norms: fresh_norms(checked, &parameters),
        passed_over: Vec::new(),
        parameters,
    }
}

/// Returns norms of which nothing is known, for the tensors that have a limit.
fn fresh_norms(checked: &Checked, parameters: &FlatParameters) -> Vec<NormMean> {
    if checked.recipe.train.update_in_backward {
        vec![NormMean::default(); parameters.slices.len()]
    } else {
        Vec::new()
    }
}

impl Parts<'_> {
    /// Returns the part of a checkpoint's `state.json` that is the same for all checkpoints of this
    /// process.
    pub(crate) fn template(&self, loader: &Loader, state: &TrainState) -> Result<Saved> {
        Ok(Saved {
            format: Saved::format(),
            position: Position::default(),
            order_hash: loader.order_hash(),
            objective: self.checked.recipe.objective.clone(),
            frozen: self.frozen()?,
            data: identities(self.sources),
            program: program_identity()?,
            layout: Saved::layout(&state.parameters.slices),
            shards: state.parameters.partition.ranks(),
            buckets: Saved::bucket_lengths(&state.parameters.partition),
            moments: self.checked.recipe.optimizer.state,
            tensor_norms: Vec::new(),
            epochs: 0.0,
            moments_from: BTreeMap::new(),
            passed_over: Vec::new(),
            guard: GuardState::default(),
            secs: 0.0,
            lineage: self.origin.lineage(),
        })
    }

    /// Returns the components that are not trained, by the names of their folders.
    fn frozen(&self) -> Result<BTreeMap<String, Frozen>> {
        let mut found = BTreeMap::new();
        for component in Component::ALL {
            if self.checked.recipe.train.trains(component) {
                continue;
            }
            let folder = self.components.folder(component);
            let path = folder.canonicalize().map_err(Error::io(folder))?;
            let blake3 = self.components.blake3(component)?.to_owned();
            found.insert(component.folder().to_owned(), Frozen { blake3, path });
        }
        Ok(found)
    }

    /// Returns the event that a process records when it begins.
    pub(crate) fn start_event(
        &self,
        state: &TrainState,
        loader: &Loader,
        num_test: u64,
        snapshot_bytes: u64,
    ) -> Start {
        // Where the run begins.
        let mut branched_from = None;
        let mut changes = Vec::new();
        match self.origin {
            Origin::Base => {}
            Origin::Resume(_, changed) => changes.clone_from(changed),
            Origin::Branch(_, ancestor) => {
                branched_from = Some(ancestor.checkpoint.clone());
                changes.clone_from(&ancestor.changed);
            }
        }

        // What it runs on.
        let ranks = self.comm.rank().ranks;
        Start {
            step: state.position.cursor,
            unix_secs: unix_secs(),
            order_hash: loader.order_hash(),
            num_parameters: state.parameters.num_parameters() as u64,
            num_train: count(self.sources, Split::Train),
            num_test,
            buckets: bucket_counts(self.sources),
            threads: tch::get_num_threads() as u32,
            branched_from,
            changes,
            snapshot_bytes,
            peak_flops: self.checked.peak_flops(),
            ranks,
            idle_share: loader.order().idle_share(ranks),
            total_samples: self.checked.recipe.train.samples,
        }
    }
}

/// Returns the version and the BLAKE3 hash of the running program.
pub(crate) fn program_identity() -> Result<String> {
    let path = env::current_exe().map_err(Error::io("the running program"))?;
    Ok(format!(
        "rectiflow {} BLAKE3 {}",
        env!("CARGO_PKG_VERSION"),
        hash_file(&path)?
    ))
}

/// Returns the seconds since 1970.
fn unix_secs() -> u64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(time) => time.as_secs(),
        Err(_) => 0,
    }
}

fn count(sources: &[Source], split: Split) -> u64 {
    let mut sum = 0;
    for source in sources {
        for bucket in source.dataset.buckets(split) {
            sum += bucket.num_rows;
        }
    }
    sum
}

/// Rows of a bucket.
#[derive(Default)]
struct Rows {
    train: u64,
    test: u64,
}

/// Returns the buckets as (width, height, training rows, test rows), the largest first.
fn bucket_counts(sources: &[Source]) -> Vec<(u32, u32, u64, u64)> {
    let mut counts = BTreeMap::<(u32, u32), Rows>::new();
    for source in sources {
        for bucket in source.dataset.buckets(Split::Train) {
            let size = (bucket.width_px, bucket.height_px);
            counts.entry(size).or_default().train += bucket.num_rows;
        }
        for bucket in source.dataset.buckets(Split::Test) {
            let size = (bucket.width_px, bucket.height_px);
            counts.entry(size).or_default().test += bucket.num_rows;
        }
    }
    let mut rows = Vec::new();
    for ((width, height), Rows { train, test }) in counts {
        rows.push((width, height, train, test));
    }
    rows.sort_by_key(|&(w, h, train, test)| (std::cmp::Reverse(train + test), w, h));
    rows
}
