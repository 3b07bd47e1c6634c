//! The recipe: one TOML file that describes a whole run.
//!
//! There are two stages. [`Recipe`] is the file as written: the serde structs of `sections`, and
//! those of the modules that use them (`guard`, `lr`, the optimiser and others). [`Checked`] is
//! what the rest of the program takes: every key is known, every value is valid, and values that
//! follow from several keys are derived. All problems are reported together, an unknown key with
//! its nearest valid name.

pub(crate) mod changes;
pub(crate) mod overrides;
#[cfg(test)]
mod page;
pub mod report;
pub mod sections;
pub(crate) mod unknown_keys;

use std::path::Path;

use rectiflow_data::{
    captioning::CaptionSettings,
    order::{Amount, OrderSettings},
    prep::PrepSettings,
};
use rectiflow_sdxl::{
    flow::{Objective, ObjectiveSettings},
    gpu,
    model::Component,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tch::Device;

use crate::{
    error::{Error, Problems, Result},
    guard::{GuardConfig, SkipBy},
    hardware::hardware,
    lr::LrConfig,
    ranks::launch::{RanksConfig, Sharding},
    recipe::{
        overrides::{NO_FILE, read_table},
        report::ReportConfig,
        sections::{
            CheckpointConfig, DataConfig, MemoryConfig, ModelConfig, PreviewConfig, RunConfig,
            TestConfig, TrainConfig,
        },
        unknown_keys::{missing_keys, take_unknown_keys},
    },
    state::{
        ema::EmaConfig,
        optim::{OptimizerConfig, OptimizerName},
    },
};

/// A recipe as written.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Where the run is stored, and on what it runs.
    pub run: RunConfig,
    /// The model that training starts from.
    pub model: ModelConfig,
    /// The data sets, in order: one `[[data]]` section each.
    pub data: Vec<DataConfig>,
    /// Which components are trained, on how many samples and in which batches.
    pub train: TrainConfig,
    /// Limits on memory, and which activations are recomputed.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What the model predicts, and at which noise levels it is trained.
    #[serde(default)]
    pub objective: ObjectiveSettings,
    /// The optimiser: AdamW or StableAdamW.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// The learning rate, as a function of the samples seen.
    #[serde(default)]
    pub lr: LrConfig,
    /// Averaged weights, kept beside the trained ones.
    #[serde(default)]
    pub ema: EmaConfig,
    /// How a run reacts to an exploding loss.
    #[serde(default)]
    pub guard: GuardConfig,
    /// How several processes share a run.
    #[serde(default)]
    pub ranks: RanksConfig,
    /// When and how the test loss is measured.
    #[serde(default)]
    pub test: TestConfig,
    /// When checkpoints are written, and how many are kept.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Preview pictures sampled during training.
    #[serde(default)]
    pub preview: PreviewConfig,
    /// Other programs' files that rank 0 writes while a run goes on, and alerts.
    #[serde(default)]
    pub report: ReportConfig,
    /// How `rectiflow prep --recipe` prepares images; training ignores it.
    #[serde(default)]
    pub prep: PrepSettings,
    /// How `rectiflow caption --recipe` asks served models about pictures; training ignores it.
    #[serde(default)]
    pub caption: CaptionSettings,
}

/// A valid recipe.
#[derive(Debug, Clone)]
pub struct Checked {
    /// The recipe with all defaults.
    pub recipe: Recipe,
    /// Device of all tensors.
    pub device: Device,
    /// The objective: noising, targets and loss weights.
    pub objective: Objective,
    /// Components that start from random weights.
    pub random: Vec<Component>,
    /// Settings of the order of samples.
    pub order: OrderSettings,
    /// The amount of each data set, in the order of the recipe.
    pub amounts: Vec<Amount>,
}

impl Recipe {
    /// Reads a recipe, applies `overrides` and checks the result. An override is
    /// `section.key=value` with the value in TOML.
    ///
    /// # Errors
    /// [`Error::Recipe`] with every problem found, or [`Error::Data`].
    pub fn load(path: &Path, overrides: &[String]) -> Result<Checked> {
        Self::check_table(read_table(Some(path), overrides)?, path)
    }

    /// As [`Recipe::load`], from a text that the file `path` contains.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Checked> {
        match text.parse() {
            Ok(table) => Self::check_table(table, path),
            Err(error) => Err(Error::recipe(path, vec![error.to_string()])),
        }
    }

    fn check_table(mut table: toml::Table, path: &Path) -> Result<Checked> {
        let mut problems = take_unknown_keys::<Self>(&mut table);
        let missing = missing_keys::<Self>(&mut table);
        if !missing.is_empty() {
            problems.extend(missing);
            return Err(Error::recipe(path, problems));
        }
        let checked = match toml::Value::Table(table).try_into::<Self>() {
            Ok(recipe) => recipe.check(),
            Err(error) => Err(vec![one_line(&error)]),
        };
        match checked {
            Ok(checked) if problems.is_empty() => return Ok(checked),
            Ok(_) => {}
            Err(more) => problems.extend(more),
        }
        Err(Error::recipe(path, problems))
    }

    /// Returns the settings for preparing images: the `[prep]` section of a recipe, or the
    /// defaults, with `overrides`. Other sections are optional.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn load_prep(path: Option<&Path>, overrides: &[String]) -> Result<PrepSettings> {
        let mut table = Self::known_table(path, overrides)?;
        section(&mut table, "prep", path)
    }

    /// Returns the `[caption]` and the `[prep]` section of a recipe, or the defaults, with
    /// `overrides`. Other sections are optional.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn load_caption(
        path: Option<&Path>,
        overrides: &[String],
    ) -> Result<(CaptionSettings, PrepSettings)> {
        let mut table = Self::known_table(path, overrides)?;
        let prep = section(&mut table, "prep", path)?;
        let caption: CaptionSettings = section(&mut table, "caption", path)?;
        let problems = caption.problems();
        if problems.is_empty() {
            return Ok((caption, prep));
        }
        Err(Error::recipe(path.unwrap_or(Path::new(NO_FILE)), problems))
    }

    /// Reads a recipe of which every key is known.
    fn known_table(path: Option<&Path>, overrides: &[String]) -> Result<toml::Table> {
        let mut table = read_table(path, overrides)?;
        let unknown = take_unknown_keys::<Self>(&mut table);
        if unknown.is_empty() {
            return Ok(table);
        }
        Err(Error::recipe(path.unwrap_or(Path::new(NO_FILE)), unknown))
    }

    /// Returns the recipe as TOML with every default written out, as stored in each checkpoint.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a recipe is plain data that TOML can hold")
    }

    fn check(self) -> std::result::Result<Checked, Vec<String>> {
        let mut problems = self.problems();
        let device = parse_device(&self.run.device);
        if let Err(reason) = &device {
            problems.push(("run.device".to_owned(), reason.clone()));
        }
        let objective = Objective::new(self.objective.clone());
        if let Err(error) = &objective {
            problems.push(("objective".to_owned(), error.to_string()));
        }
        let (Ok(device), Ok(objective), true) = (device, objective, problems.is_empty()) else {
            return Err(problems.iter().map(problem_line).collect());
        };
        let amounts = self.data.iter().map(DataConfig::amount).collect();
        let (random, _) = self.random_components();
        Ok(Checked {
            order: self.order_settings(),
            recipe: self,
            device,
            objective,
            random,
            amounts,
        })
    }

    fn order_settings(&self) -> OrderSettings {
        OrderSettings {
            seed: self.run.seed,
            micro_batch: self.train.micro_batch,
            micro_batches: self.train.micro_batches,
            lanes: self.train.lanes,
            mode: self.train.mode,
            window_samples: self.train.window_samples,
        }
    }

    fn problems(&self) -> Vec<(String, String)> {
        let mut problems = self.run.problems();
        problems.extend(self.data_problems());
        problems.extend(self.train.problems());
        problems.extend(self.lr.problems(self.train.samples));
        problems.extend(self.optimizer.problems());
        problems.extend(self.ema.problems());
        problems.extend(self.guard.problems());
        problems.extend(self.memory.problems());
        problems.extend(self.ranks.problems());
        problems.extend(self.preview.problems());
        problems.extend(self.report.problems());
        problems.extend(self.test.problems());
        problems.extend(self.checkpoint.problems());
        problems.extend(self.price_problems());
        problems.extend(self.random_problems());
        problems.extend(self.in_backward_problems());
        problems
    }

    /// Returns what does not fit updates during the backward pass.
    fn in_backward_problems(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        if !self.train.update_in_backward {
            return found;
        }
        let guard = &self.guard;
        let late =
            "since with train.update_in_backward a gradient's norm is known after the update";
        let mut refuse = |key: &str, expected: &str, is: String| {
            found.push((
                key.to_owned(),
                format!("expected {expected}, {late}; found {is}"),
            ));
        };
        if guard.enabled && guard.skip_by == SkipBy::LossAndNorm {
            refuse("guard.skip_by", "\"loss\"", "\"loss_and_norm\"".to_owned());
        }
        if let (true, Some(clip_z)) = (guard.enabled, guard.clip_z) {
            refuse("guard.clip_z", "none", clip_z.to_string());
        }
        if guard.enabled && guard.vitals_every_updates > 0 {
            let every = guard.vitals_every_updates.to_string();
            refuse("guard.vitals_every_updates", "0", every);
        }
        if self.optimizer.name == OptimizerName::StableAdamW {
            refuse("optimizer.name", "\"adamw\"", "\"stable_adamw\"".to_owned());
        }
        if self.ranks.sharding == Sharding::Each {
            refuse(
                "ranks.sharding",
                "\"once\" or \"none\"",
                "\"each\"".to_owned(),
            );
        }
        found
    }

    /// Returns the components named in `model.random`, and the names that are invalid.
    fn random_components(&self) -> (Vec<Component>, Vec<String>) {
        let mut unknown = self.model.random.clone();
        unknown.retain(|name| !TRAINABLE.iter().any(|component| component.folder() == name));
        let mut known = TRAINABLE.to_vec();
        known.retain(|component| {
            self.model
                .random
                .iter()
                .any(|name| name == component.folder())
        });
        (known, unknown)
    }

    fn random_problems(&self) -> Vec<(String, String)> {
        let (random, unknown) = self.random_components();
        let valid = TRAINABLE.map(Component::folder).join(", ");
        let mut problems = Problems::of("model");
        for name in unknown {
            problems.add(
                "random",
                format!("expected any of {valid}, found \"{name}\""),
            );
        }
        for component in random {
            if self.train.trains(component) {
                continue;
            }
            let name = component.folder();
            let reason = format!(
                "{name} would start from random weights and never be trained; set \
                 train.text_encoders = \"trained\", or remove {name} from the list and choose a \
                 base that has its weights"
            );
            problems.add("random", reason);
        }
        problems.into_pairs()
    }

    fn price_problems(&self) -> Vec<(String, String)> {
        let mut problems = Problems::of("run");
        if let Some(price) = self.run.price_per_hour {
            problems.expect_at_least_0("price_per_hour", price);
        }
        problems.into_pairs()
    }

    fn data_problems(&self) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        if self.data.is_empty() {
            let reason = "expected at least one [[data]] section with a path";
            problems.push(("data".to_owned(), reason.to_owned()));
        }
        problems.extend(self.shares_problem());
        for (index, data) in self.data.iter().enumerate() {
            let section = Problems::of(format!("data[{index}]"));
            problems.extend(data.problems(section));
        }
        problems
    }

    /// Returns the problem of the data sets' shares, of which there are none or one per data set.
    fn shares_problem(&self) -> Option<(String, String)> {
        let shares: Vec<f64> = self.data.iter().filter_map(|data| data.share).collect();
        let sum = shares.iter().sum::<f64>();
        let is_wrong = shares.len() != self.data.len() || (sum - 1.0).abs() > 1e-6;
        if shares.is_empty() || !is_wrong {
            return None;
        }
        let reason = format!(
            "expected one for each of the {} data sets, summing to 1; found {} that sum to {sum}",
            self.data.len(),
            shares.len()
        );
        Some(("data.share".to_owned(), reason))
    }
}

/// Takes a section out of a recipe; the defaults if it has none.
fn section<T: DeserializeOwned>(
    table: &mut toml::Table,
    name: &str,
    path: Option<&Path>,
) -> Result<T> {
    let section = match table.remove(name) {
        Some(section) => section,
        None => toml::Value::Table(toml::Table::new()),
    };
    section.try_into().map_err(|error| {
        let problem = format!("{name}: {}", one_line(&error));
        Error::recipe(path.unwrap_or(Path::new(NO_FILE)), vec![problem])
    })
}

impl Checked {
    /// Returns the samples per step, at most: incomplete micro-batches of small buckets hold fewer.
    pub fn batch(&self) -> u64 {
        (self.order.micro_batch * self.order.micro_batches) as u64
    }

    /// Returns the peak of the run's GPU, in FLOP/s; `None` on a CPU, or if the recipe does not
    /// name the GPU.
    pub fn peak_flops(&self) -> Option<f64> {
        let name = self.recipe.run.hardware.as_ref()?;
        if !self.device.is_cuda() {
            return None;
        }
        Some(hardware(name).ok()?.peak_flops)
    }
}

/// Components that can be trained or start from random weights.
pub(crate) const TRAINABLE: [Component; 3] = [Component::UNet, Component::ClipL, Component::ClipG];

/// Returns the device of that name: `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// One sentence with what was expected and found.
pub fn parse_device(name: &str) -> std::result::Result<Device, String> {
    let index: Option<usize> = match name.split_once(':') {
        None if name == "cpu" => return Ok(Device::Cpu),
        None if name == "cuda" => Some(0),
        Some(("cuda", index)) => index.parse().ok(),
        _ => None,
    };
    let Some(index) = index else {
        return Err(format!("expected cpu, cuda or cuda:N, found \"{name}\""));
    };
    match gpu::why_not(index) {
        Some(reason) => Err(format!("\"{name}\" cannot be used: {reason}")),
        None => Ok(Device::Cuda(index)),
    }
}

fn problem_line((key, reason): &(String, String)) -> String {
    format!("{key}: {reason}")
}

fn one_line(error: &toml::de::Error) -> String {
    error.to_string().trim().replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use rectiflow_sdxl::flow::Parameterization;

    use super::*;
    use crate::recipe::sections::TextEncoders;

    const RECIPE: &str = "[run]\ndir = 'runs/x'\n[model]\nbase = 'm'\n[[data]]\npath = 'd'\n\
                          [train]\nsamples = 100\nmicro_batch = 4\n";

    fn load(text: &str, overrides: &[&str]) -> Result<Checked> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("recipe.toml");
        fs::write(&path, text).expect("the recipe is written");
        Recipe::load(
            &path,
            &overrides
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>(),
        )
    }

    fn problems(text: &str, overrides: &[&str]) -> Vec<String> {
        match load(text, overrides) {
            Err(Error::Recipe { problems, .. }) => problems,
            other => panic!("expected problems, found {other:?}"),
        }
    }

    #[test]
    fn the_smallest_recipe_takes_the_articles_defaults() {
        let checked = load(RECIPE, &[]).expect("it can be run");
        assert_eq!(checked.batch(), 4);
        let recipe = &checked.recipe;
        assert_eq!(
            (
                recipe.lr.peak,
                recipe.optimizer.weight_decay,
                recipe.train.clip_norm
            ),
            (1e-4, 0.1, 1.0)
        );
        assert_eq!(
            (recipe.objective.shift, recipe.objective.stratified),
            (3.0, true)
        );
        assert_eq!(checked.amounts, [Amount::Repeats(1.0)]);
    }

    #[test]
    fn a_resolved_recipe_reads_back_as_itself() {
        let first = load(RECIPE, &[]).expect("it can be run").recipe.to_toml();
        assert_eq!(
            load(&first, &[]).expect("it can be run").recipe.to_toml(),
            first
        );
    }

    #[test]
    fn overrides_reach_into_sections_and_take_bare_strings() {
        let overrides = [
            "train.samples=7",
            "lr.peak = 2e-5",
            "data.path=other/set",
            "preview.prompts=['a', 'b']",
        ];
        let recipe = load(RECIPE, &overrides).expect("it can be run").recipe;
        assert_eq!((recipe.train.samples, recipe.lr.peak), (7, 2e-5));
        assert_eq!(recipe.data[0].path, Path::new("other/set"));
        assert_eq!(recipe.preview.prompts, ["a", "b"]);
        assert!(problems(RECIPE, &["train.samples"])[0].contains("no `=`"));
        assert!(problems(RECIPE, &["run.dir.x=1"])[0].contains("not a single section"));
    }

    #[test]
    fn every_problem_is_in_the_one_report() {
        let overrides = [
            "train.samples=0",
            "train.micro_batch=0",
            "optimizer.beta2=1.0",
            "run.device=tpu",
            "data.repeats=-1",
            "run.hardware=h100",
        ];
        let found = problems(RECIPE, &overrides).join("\n");
        for key in [
            "train.samples",
            "train.micro_batch",
            "optimizer.beta2",
            "run.device",
            "run.hardware",
            "data[0].repeats",
        ] {
            assert!(
                found.contains(&format!("{key}: ")),
                "{key} is missing in\n{found}"
            );
        }
    }

    #[test]
    fn a_text_encoder_cannot_be_random_and_frozen() {
        let found = problems(RECIPE, &["model.random=['text_encoder', 'vae']"]);
        assert!(
            found
                .iter()
                .any(|problem| problem.contains("train.text_encoders = \"trained\"")),
            "{found:?}"
        );
        assert!(
            found
                .iter()
                .any(|problem| problem.contains("found \"vae\"")),
            "{found:?}"
        );
        load(
            RECIPE,
            &[
                "model.random=['text_encoder']",
                "train.text_encoders=trained",
            ],
        )
        .expect("it can be run");
    }

    #[test]
    fn shares_are_for_all_data_sets_or_none() {
        let two = format!("{RECIPE}[[data]]\npath = 'e'\nshare = 0.5\n");
        assert!(
            problems(&two, &[])
                .iter()
                .any(|problem| problem.starts_with("data.share: "))
        );
    }

    #[test]
    fn every_recipe_of_the_repository_can_be_run() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes");
        let mut recipes = Vec::new();
        for folder in [PathBuf::from(root), Path::new(root).join("article")] {
            for entry in fs::read_dir(folder).expect("the recipes") {
                recipes.push(entry.expect("an entry").path());
            }
        }
        recipes.retain(|path| path.extension().is_some_and(|ending| ending == "toml"));
        assert!(recipes.len() >= 6, "{recipes:?}");
        for path in recipes {
            // This machine may lack the recipe's device.
            Recipe::load(&path, &["run.device=cpu".to_owned()])
                .unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn the_large_recipe_is_the_articles() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../recipes/article/sdxl-flow-32xh100.toml"
        );
        let checked =
            Recipe::load(Path::new(path), &["run.device=cpu".to_owned()]).expect("it can be run");
        let Recipe {
            train,
            optimizer,
            lr,
            objective,
            ..
        } = &checked.recipe;
        assert_eq!(
            (checked.batch(), train.micro_batch, train.micro_batches),
            (4096, 16, 32 * 8)
        );
        assert_eq!(
            (train.samples, train.clip_norm, train.text_encoders),
            (150_000_000, 1.0, TextEncoders::Frozen)
        );
        assert_eq!(
            (
                optimizer.beta1,
                optimizer.beta2,
                optimizer.eps,
                optimizer.weight_decay
            ),
            (0.9, 0.999, 1e-8, 0.1)
        );
        assert_eq!(
            (lr.peak, lr.warmup_samples, lr.min_ratio),
            (1e-4, 1_000_000, 0.0)
        );
        assert_eq!(
            (
                lr.rate(1_000_000, train.samples),
                lr.rate(150_000_000, train.samples)
            ),
            (1e-4, 0.0)
        );
        assert_eq!(
            (objective.parameterization, objective.shift),
            (Parameterization::Flow, 3.0)
        );
    }

    #[test]
    fn text_encoders_are_trained_apart() {
        for (name, trained) in [
            ("frozen", [true, false, false, false]),
            ("trained", [true, true, true, false]),
            ("text_encoder", [true, true, false, false]),
            ("text_encoder_2", [true, false, true, false]),
        ] {
            let recipe = load(RECIPE, &[&format!("train.text_encoders={name}")])
                .expect("it can be run")
                .recipe;
            assert_eq!(
                Component::ALL.map(|component| recipe.train.trains(component)),
                trained,
                "{name}"
            );
        }
    }

    #[test]
    fn a_checkpoint_to_keep_must_be_one_that_is_written() {
        let found = problems(
            RECIPE,
            &[
                "checkpoint.every_steps=100",
                "checkpoint.keep_every_steps=250",
            ],
        );
        assert!(
            found[0].contains("a multiple of checkpoint.every_steps = 100"),
            "{found:?}"
        );
    }

    #[test]
    fn what_does_not_fit_updates_in_the_backward_pass_is_named_by_key() {
        let on = "train.update_in_backward=true";
        let fits = [on, "guard.skip_by=loss", "guard.vitals_every_updates=0"];
        load(RECIPE, &fits).expect("it can be run");
        load(RECIPE, &[on, "guard.enabled=false"]).expect("there is no guard");
        for (key, set) in [
            ("train.update_in_backward", "train.micro_batches=2"),
            ("guard.skip_by", "guard.skip_by=loss_and_norm"),
            ("guard.clip_z", "guard.clip_z=2.5"),
            (
                "guard.vitals_every_updates",
                "guard.vitals_every_updates=100",
            ),
            ("optimizer.name", "optimizer.name=stable_adamw"),
            ("ranks.sharding", "ranks.sharding=each"),
            ("train.clip_ratio", "train.clip_ratio=1"),
        ] {
            let found = problems(RECIPE, &[&fits[..], &[set]].concat());
            let [problem] = &found[..] else {
                panic!("one problem for {set}: {found:?}");
            };
            assert!(
                problem.starts_with(&format!("{key}: expected")),
                "{problem}"
            );
        }
        let both = ["optimizer.state=8bit", "optimizer.name=stable_adamw"];
        assert!(problems(RECIPE, &both)[0].starts_with("optimizer.state: expected"));
    }
}
