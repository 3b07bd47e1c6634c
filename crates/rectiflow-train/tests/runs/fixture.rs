//! A packed data set of small latents and the tiny SDXL, trained in-process: a run of 16 steps
//! takes one or two seconds.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use half::f16;
use rectiflow_data::{
    Codec, Manifest, Record, SampleId, Split,
    batch::Step,
    bucket::{Bucket, Geometry, ResizeSpace},
    manifest::{Object, commit},
    order::RankOf,
    rng::{Purpose, Rng},
    shard::ObjectWriter,
};
use rectiflow_sdxl::model::Component;
use rectiflow_train::{
    Result,
    launch::Launch,
    metrics::Event,
    recipe::{Checked, Recipe},
    run::{Options, Outcome, train},
    state::TrainState,
    weights_hash::hash_weights,
};

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny-sdxl");
/// Width, height, training rows and test rows of each bucket.
const BUCKETS: [(u32, u32, u64, u64); 2] = [(64, 64, 40, 10), (96, 64, 21, 6)];

/// A folder with a data set, a base model and the runs of a test.
pub(crate) struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    /// Packs the data and trains a base model: the tiny SDXL after one step, so that its text
    /// encoders have weights.
    pub(crate) fn new() -> Self {
        Self::with_poison(None)
    }

    /// As [`Fixture::new`], but one sample's latents are ten thousand times too large, within the
    /// range of half precision.
    pub(crate) fn with_poison(poison: Option<u64>) -> Self {
        // The sum of a reduction depends on the number of threads.
        rectiflow_sdxl::test_threads::set();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let fixture = Self { folder };
        pack(&fixture.path("data"), poison);
        let recipe = fixture.write(
            "base",
            &format!(
                "[model]\nbase = '{TINY}'\nrandom = ['unet', 'text_encoder', 'text_encoder_2']\n"
            ),
        );
        let set = [
            "train.samples=8",
            "train.text_encoders=trained",
            "lr.peak=1e-6",
            "guard.enabled=false",
        ];
        run(&load(&recipe, &set)).expect("the base is trained");
        fixture
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns the checkpoint of the base model.
    pub(crate) fn base(&self) -> PathBuf {
        self.checkpoint("base", 1)
    }

    pub(crate) fn checkpoint(&self, run: &str, step: u64) -> PathBuf {
        self.path(run).join(format!("checkpoints/step-{step:08}"))
    }

    fn write(&self, name: &str, model: &str) -> PathBuf {
        let text = format!(
            "[run]\ndir = '{}'\nseed = 3\n{model}[[data]]\npath = '{}'\n\
             [train]\nsamples = 128\nmicro_batch = 4\nmicro_batches = 2\nclip_norm = 1e9\n\
             [lr]\npeak = 1e-3\ndecay = 'constant'\n[test]\nevery_steps = 1000\n\
             [checkpoint]\nevery_steps = 8\n[preview]\nevery_steps = 1000\n\
             [guard]\nwarmup_updates = 8\n",
            self.path(name).display(),
            self.path("data").display(),
        );
        let path = self.path(&format!("{name}.toml"));
        fs::write(&path, text).expect("the recipe is written");
        path
    }

    /// Returns the recipe of a run of 16 steps of 8 samples, with checkpoints at steps 8 and 16,
    /// overridden.
    pub(crate) fn recipe(&self, name: &str, overrides: &[&str]) -> Checked {
        load(
            &self.write(
                name,
                &format!("[model]\nbase = '{}'\n", self.base().display()),
            ),
            overrides,
        )
    }
}

fn load(path: &Path, overrides: &[&str]) -> Checked {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    Recipe::load(path, &overrides).expect("the recipe can be run")
}

/// How a run ended, and its events.
pub(crate) struct Ran {
    pub(crate) outcome: Result<Outcome>,
    pub(crate) events: Vec<Event>,
}

impl Ran {
    /// Returns the steps whose update was not applied.
    pub(crate) fn passed_over(&self) -> Vec<u64> {
        let step = |event: &Event| match event {
            Event::Step(step) if !step.applied => Some(step.step),
            _ => None,
        };
        self.events.iter().filter_map(step).collect()
    }

    /// Returns the guard's actions: step and name.
    pub(crate) fn acts(&self) -> Vec<(u64, &str)> {
        let mut acts = Vec::new();
        for event in &self.events {
            if let Event::Guard(act) = event {
                acts.push((act.step, act.action.as_str()));
            }
        }
        acts
    }

    /// Returns the last test loss.
    pub(crate) fn test_loss(&self) -> f64 {
        let loss = |event: &Event| match event {
            Event::Test(test) => Some(test.loss),
            _ => None,
        };
        self.events
            .iter()
            .rev()
            .find_map(loss)
            .expect("the end of a run is measured")
    }
}

pub(crate) fn run(checked: &Checked) -> Result<Outcome> {
    run_with(checked, Options::default(), |_| {}).outcome
}

/// Trains and passes each event to `observe`.
pub(crate) fn run_with(
    checked: &Checked,
    options: Options<'_>,
    mut observe: impl FnMut(&Event),
) -> Ran {
    let mut events = Vec::new();
    let outcome = train(checked, options, &AtomicBool::new(false), &mut |event| {
        observe(event);
        events.push(event.clone());
    });
    Ran { outcome, events }
}

/// Trains with several ranks, each a thread with its own recipe; `spoil` may change each rank's
/// steps.
pub(crate) fn run_ranks(recipes: &[Checked], spoil: impl Fn(usize, &mut Step) + Sync) -> Vec<Ran> {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let (ranks, spoil) = (recipes.len(), &spoil);
    let one = move |rank: usize, checked: &Checked| {
        let place = RankOf { rank, ranks };
        let (host, attempt) = ("127.0.0.1".to_owned(), String::new());
        let launch = Launch {
            rank: place,
            local_rank: rank,
            machine: 0..ranks,
            host,
            port,
            store_is_launchers: false,
            attempt,
        };
        let mut before_step = |step: &mut Step, _: &mut TrainState| spoil(rank, step);
        let launch = Some(launch).filter(|_| ranks > 1);
        let options = Options {
            before_step: Some(&mut before_step),
            launch,
            ..Options::default()
        };
        run_with(checked, options, |_| {})
    };
    thread::scope(|scope| {
        let threads: Vec<_> = recipes
            .iter()
            .enumerate()
            .map(|(rank, checked)| scope.spawn(move || one(rank, checked)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Trains on steps that `spoil` may change; steps count from 1, as in the log.
pub(crate) fn run_spoilt(checked: &Checked, mut spoil: impl FnMut(u64, &mut Step)) -> Ran {
    run_disturbed(checked, |step, _| spoil(step.step + 1, step))
}

/// Trains on steps and with a state that `disturb` may change.
pub(crate) fn run_disturbed(
    checked: &Checked,
    mut disturb: impl FnMut(&mut Step, &mut TrainState),
) -> Ran {
    let mut before_step = |step: &mut Step, state: &mut TrainState| disturb(step, state);
    let options = Options {
        before_step: Some(&mut before_step),
        ..Options::default()
    };
    run_with(checked, options, |_| {})
}

/// Trains until a step is done, then stops as on a signal.
pub(crate) fn run_until(checked: &Checked, options: Options<'_>, last: u64) -> Outcome {
    let stop = AtomicBool::new(false);
    let outcome = train(checked, options, &stop, &mut |event| {
        if matches!(event, Event::Step(step) if step.step == last) {
            stop.store(true, Ordering::Relaxed);
        }
    });
    outcome.expect("the run is interrupted without an error")
}

/// Multiplies the latents of a step's first micro-batch, within the range of half precision.
pub(crate) fn scale_latents(step: &mut Step, factor: f32) {
    scale(&mut step.micro_batches[0].latents, factor);
}

fn scale(latents: &mut [f16], factor: f32) {
    for value in latents {
        *value = f16::from_f32((value.to_f32() * factor).clamp(-65504.0, 65504.0));
    }
}

/// Sets one number of a step to NaN.
pub(crate) fn spoil_with_nan(step: &mut Step) {
    step.micro_batches[0].latents[0] = f16::NAN;
}

/// Samples of one of three colours each; the caption names the colour.
fn record(id: u64, (width_px, height_px): (u32, u32)) -> Record {
    Record {
        id: SampleId(id),
        caption_sources: Vec::new(),
        captions: vec![format!(
            "a {} square",
            ["red", "green", "blue"][id as usize % 3]
        )],
        tags: Vec::new(),
        important_tags: Vec::new(),
        quality: Vec::new(),
        verbatim: false,
        original_width_px: width_px,
        original_height_px: height_px,
        crop_left_px: 0,
        crop_top_px: 0,
        target_width_px: width_px,
        target_height_px: height_px,
        source: format!("{id}.png"),
    }
}

/// Latents with channel means by colour and a little noise, on the scale of real latents.
fn latents(id: u64, shape: [usize; 3]) -> Vec<f16> {
    let mut rng = Rng::keyed(5, Purpose::Noise, &[id]);
    let plane = shape[1] * shape[2];
    let mean = |channel: usize| {
        if channel == id as usize % 3 {
            10.0
        } else {
            -5.0
        }
    };
    (0..shape[0] * plane)
        .map(|at| f16::from_f64(mean(at / plane) + 4.0 * (rng.f64() - 0.5)))
        .collect()
}

fn empty_manifest() -> Manifest {
    let codec = Codec {
        vae: "tiny".to_owned(),
        hash: hash_weights(Component::Vae, &Path::new(TINY).join("vae"))
            .expect("the tiny VAE exists"),
        scaling_factor: 0.13025,
        down_factor: 8,
        channels: 4,
        dtype: "F16".to_owned(),
    };
    let geometry = Geometry {
        area_px: 64 * 64,
        step_px: 32,
        bucket_min_px: 32,
        bucket_max_px: 128,
        resize: ResizeSpace::Gamma,
        background: [255; 3],
        seed: 0,
    };
    Manifest::new(codec, geometry)
}

fn pack(root: &Path, poison: Option<u64>) {
    let mut manifest = empty_manifest();
    let (mut blocks, mut ids) = (Vec::new(), 0..);
    for (bucket, (width_px, height_px, train, test)) in (0..).zip(BUCKETS) {
        manifest.buckets.push(Bucket {
            width_px,
            height_px,
        });
        for (split, num_rows) in [(Split::Train, train), (Split::Test, test)] {
            let name = format!("{width_px}x{height_px}-{}", split as u8);
            let (latents_name, text) = (
                format!("latents/{name}.safetensors"),
                format!("text/{name}.parquet"),
            );
            let shape = [4, height_px as usize / 8, width_px as usize / 8];
            let mut writer =
                ObjectWriter::create(root, &latents_name, &text, shape).expect("an object");
            for id in ids.by_ref().take(num_rows as usize) {
                let mut latents = latents(id, shape);
                if poison == Some(id) {
                    scale(&mut latents, 1e4);
                }
                writer
                    .push(&latents, record(id, (width_px, height_px)))
                    .expect("a row");
            }
            let done = writer.finish().expect("an object");
            let (rows, text_bytes) = (done.rows, done.text_bytes);
            let deleted = None;
            manifest.objects.push(Object {
                bucket,
                split,
                rows,
                latents: latents_name,
                text,
                text_bytes,
                deleted,
            });
            blocks.push(done.blocks);
        }
    }
    commit(root, &mut manifest, &blocks).expect("the data set is written");
}
