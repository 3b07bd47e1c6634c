//! Seeded mutations of recipes: each is refused with its problems, or means what it says. Whatever
//! is derived from an accepted one can be computed.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{fs, path::Path};

use checks::mutation::cases;
use rectiflow_train::{
    Error,
    facts::Facts,
    hardware::{NETWORKS, hardware, network},
    plan::{plan, setup::Question},
    recipe::{Checked, Recipe},
};

const ASSETS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets");
const RECIPES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes");

/// Recipes as people write them, and one with every default, as a checkpoint has it. All are of the
/// tiny model, whose plan takes no time.
fn recipes(folder: &Path) -> Vec<String> {
    let mut texts = Vec::new();
    for name in ["demo.toml", "sdxl-flow-32xh100.toml"] {
        let text = fs::read_to_string(Path::new(RECIPES).join(name)).unwrap();
        let base = format!("base = '{ASSETS}/tiny-sdxl'");
        let with_base = |line: &str| {
            if line.starts_with("base =") {
                base.clone()
            } else {
                line.to_owned()
            }
        };
        texts.push(text.lines().map(with_base).collect::<Vec<_>>().join("\n"));
    }
    let path = folder.join("first.toml");
    fs::write(&path, &texts[0]).unwrap();
    let resolved = Recipe::load(&path, &["ema.half_life_samples=1000".to_owned()]).unwrap();
    texts.push(resolved.recipe.to_toml());
    texts
}

/// Derives from a recipe what a run and a plan do.
fn derive(checked: &Checked, path: &Path, with_plan: bool) {
    let recipe = &checked.recipe;
    let samples = recipe.train.samples;
    assert!(checked.batch() > 0);
    for seen in [0, 1, samples / 2, samples] {
        assert!(recipe.lr.rate(seen, samples).is_finite(), "{seen}");
        let _ = recipe.ema.keep(checked.batch(), seen);
    }
    fs::write(path, recipe.to_toml()).unwrap();
    let again = Recipe::load(path, &[]).unwrap();
    assert_eq!(again.recipe.to_toml(), recipe.to_toml());
    if with_plan {
        is_planned(checked);
    }
}

#[test]
fn mutated_recipes_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let recipes = recipes(folder.path());
    let path = folder.path().join("mutated.toml");
    let (mut num_read, mut num_refused) = (0, 0);
    for case in cases() {
        let mut random = case.random();
        let text = random.of(&recipes).as_bytes();
        fs::write(&path, case.mutation.of(text, &mut random)).unwrap();
        case.run("a recipe", || match Recipe::load(&path, &[]) {
            Ok(checked) => {
                derive(&checked, &path, case.seed % 4 == 0);
                num_read += 1;
            }
            Err(Error::Recipe { problems, .. }) => {
                assert!(!problems.is_empty());
                num_refused += 1;
            }
            // Bytes that are no text.
            Err(Error::Data(rectiflow_data::Error::Invalid { .. })) => num_refused += 1,
            Err(other) => panic!("{other}"),
        });
    }
    assert!(num_read > 0 && num_refused > 0, "{num_read} {num_refused}");
}

const COMPONENTS: [&str; 4] = ["unet", "text_encoder", "text_encoder_2", "vae"];

#[test]
fn mutated_model_configurations_are_planned_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    for component in COMPONENTS {
        let from = Path::new(ASSETS)
            .join("tiny-sdxl")
            .join(component)
            .join("config.json");
        fs::create_dir_all(base.join(component)).unwrap();
        fs::copy(from, base.join(component).join("config.json")).unwrap();
    }
    let path = folder.path().join("recipe.toml");
    fs::write(&path, &recipes(folder.path())[0]).unwrap();
    let set = [
        format!("model.base={}", base.display()),
        "train.micro_batch=4096".to_owned(),
        "train.micro_batches=4096".to_owned(),
        "memory.checkpointing=budget".to_owned(),
        "memory.budget_gib=8".to_owned(),
    ];
    let checked = Recipe::load(&path, &set).unwrap();
    let mut num_planned = 0;
    for case in cases() {
        let mut random = case.random();
        let config = base.join(random.of(&COMPONENTS)).join("config.json");
        let good = fs::read(&config).unwrap();
        fs::write(&config, case.mutation.of(&good, &mut random)).unwrap();
        num_planned += usize::from(case.run("a configuration", || is_planned(&checked)));
        fs::write(&config, good).unwrap();
    }
    assert!(
        num_planned > 0 && num_planned < cases().len(),
        "{num_planned}"
    );
}

/// Whether a run can be planned. Its plan has numbers.
fn is_planned(checked: &Checked) -> bool {
    let question = Question {
        hardware: hardware("h100-sxm").unwrap(),
        gpus: 1,
        network: network(NETWORKS[0].name).unwrap(),
        mfu: None,
        price_per_gpu_hour: None,
        within_hours: None,
    };
    let facts = Facts::read(checked, 1, 3);
    let Ok(planned) = facts.and_then(|facts| plan(checked, &facts, &question)) else {
        return false;
    };
    assert!(planned.time.hours.is_finite() && planned.memory_bytes > 0.0);
    if let Some(cheapest) = planned.setups.cheapest {
        assert!(cheapest.time.hours <= planned.setups.within_hours);
        assert!(cheapest.memory_bytes <= planned.setups.within_bytes);
    }
    true
}
