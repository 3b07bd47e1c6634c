//! What a plan says of the published run, of recomputation, and of the cheapest set-up.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use rectiflow_train::{
    facts::Facts,
    gpu_memory::RUNTIME_BYTES,
    hardware::{NETWORKS, hardware, network},
    launch::Sharding,
    plan::{
        Plan, plan,
        search::{FREE_SHARE, Priced},
        setup::Question,
    },
    recipe::{Recipe, sections::Checkpointing},
};

const RECIPES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes");
const ARTICLE: &str = "article/sdxl-flow-32xh100.toml";
const RECOMMENDED: &str = "sdxl-flow-32xh100.toml";

fn question(gpus: usize) -> Question {
    Question {
        hardware: hardware("h100-sxm").unwrap(),
        gpus,
        network: network(NETWORKS[0].name).unwrap(),
        mfu: None,
        price_per_gpu_hour: Some(3.75),
        within_hours: None,
    }
}

fn planned(recipe: &str, set: &[&str], question: &Question) -> Plan {
    let mut overrides = vec!["run.device=cpu".to_owned()];
    overrides.extend(set.iter().map(ToString::to_string));
    let checked = Recipe::load(&Path::new(RECIPES).join(recipe), &overrides).unwrap();
    let facts = Facts::read(&checked, question.gpus, 1).unwrap();
    plan(&checked, &facts, question).unwrap()
}

#[track_caller]
fn near(found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found / expected - 1.0).abs() < tolerance,
        "found {found}, expected {expected}"
    );
}

/// 11, 9.6 and 9.4 samples/s a GPU, 31 GB, 139 hours and about $16,000, with every block
/// recomputed.
#[test]
fn the_published_run_is_reproduced_within_5_percent() {
    for (gpus, rate) in [(1, 11.0), (8, 9.6), (32, 9.4)] {
        let found = planned(ARTICLE, &[], &question(gpus));
        near(found.time.samples_per_sec / gpus as f64, rate, 0.05);
    }
    let found = planned(ARTICLE, &[], &question(32));
    assert_eq!(found.setups.recipe.setup.checkpointing, Checkpointing::Full);
    near(found.memory_bytes, 31e9, 0.05);
    near(found.time.hours, 139.0, 0.05);
    near(found.time.money.unwrap(), 16_000.0, 0.05);
    near(found.time.mfu, 0.194, 0.01);
    near(found.time.hfu, 9.4 * 26.82e12 / 989.4e12, 0.01);
}

const OFF: &str = "memory.checkpointing=off";
const BUDGET: [&str; 2] = ["memory.checkpointing=budget", "memory.budget_gib=60"];

#[test]
fn recomputation_takes_the_time_of_its_arithmetic() {
    for mfu in [None, Some(0.31)] {
        let alone = Question { mfu, ..question(1) };
        let full = planned(ARTICLE, &[], &alone);
        let budget = planned(ARTICLE, &BUDGET, &alone);
        let off = planned(ARTICLE, &[OFF], &alone);
        assert_eq!(off.flops.recomputed, 0.0);
        assert!(budget.flops.recomputed > 0.1 * full.flops.recomputed);
        assert!(budget.flops.recomputed < full.flops.recomputed);
        for part in [&full, &budget] {
            // Alone, nothing is waited for: time is arithmetic over the same share of the peak.
            let spent = part.flops.sample + part.flops.recomputed;
            near(
                part.time.hours / off.time.hours,
                spent / off.flops.sample,
                1e-9,
            );
            near(part.time.money.unwrap(), part.time.hours * 3.75, 1e-9);
            near(part.time.hfu, off.time.hfu, 1e-9);
            near(
                part.time.mfu,
                part.time.hfu * part.flops.sample / spent,
                1e-9,
            );
        }
        assert_eq!(off.time.mfu, off.time.hfu);
        if let Some(mfu) = mfu {
            near(off.time.mfu, mfu, 1e-9);
        }
    }
}

/// The activations of 16 samples take 111 GB.
#[test]
fn the_articles_micro_batch_does_not_fit_without_checkpointing() {
    let off = planned(ARTICLE, &[OFF], &question(32));
    let full = planned(ARTICLE, &[], &question(32));
    near(off.memory_bytes - full.memory_bytes, 111e9 - 10.05e9, 0.005);
    assert!(
        off.warnings
            .iter()
            .any(|warning| warning.contains("does not fit"))
    );
    assert_eq!(off.setups.recipe.recomputed_blocks, 0);
    assert_eq!(full.setups.recipe.recomputed_blocks, full.setups.num_blocks);
    // 17 residual blocks, and 70 layers of transformers.
    assert_eq!(full.setups.num_blocks, 17 + 70);
}

#[test]
fn the_cheapest_set_up_recomputes_next_to_nothing() {
    let found = planned(ARTICLE, &[], &question(32));
    let cheapest = found.setups.cheapest.unwrap();
    assert_eq!((cheapest.setup.gpus, cheapest.setup.micro_batch), (32, 8));
    assert_eq!(cheapest.setup.micro_batches, 512);
    assert_eq!(cheapest.setup.sharding, Sharding::Once);
    assert!(cheapest.recomputed_blocks <= 2);
    assert!(cheapest.memory_bytes <= (1.0 - FREE_SHARE) * 80e9);
    // 138.5 hours and $16,626 times the share of what is not recomputed, 20.39 of 26.82 TFLOP.
    near(cheapest.time.hours, 105.3, 0.01);
    near(cheapest.time.money.unwrap(), 12_640.0, 0.01);
    near(cheapest.time.simulated_hours, 90.4, 0.01);
}

/// Overrides that set up a run as a search may.
fn overrides(micro_batch: usize, checkpointing: &str, sharding: &str) -> Vec<String> {
    let mut set = vec![
        format!("train.micro_batch={micro_batch}"),
        format!("train.micro_batches={}", 4096 / micro_batch),
        format!("memory.checkpointing={checkpointing}"),
        format!("ranks.sharding={sharding}"),
    ];
    if checkpointing == "budget" {
        let gib = (0.95 * 80e9 - RUNTIME_BYTES) / f64::from(1 << 30);
        set.push(format!("memory.budget_gib={}", gib.floor()));
    }
    set
}

#[test]
fn no_other_set_up_that_fits_is_cheaper() {
    let limit_bytes = 0.95 * 80e9;
    let article = planned(ARTICLE, &[], &question(16)).setups;
    let cheapest = article.cheapest.unwrap();
    let mut num_fitting = 0;
    for micro_batch in [2, 4, 8, 16, 32] {
        for checkpointing in ["off", "full", "budget"] {
            for sharding in ["once", "each", "none"] {
                for gpus in [8, 16] {
                    let set = overrides(micro_batch, checkpointing, sharding);
                    let set: Vec<&str> = set.iter().map(String::as_str).collect();
                    let other: Priced = planned(ARTICLE, &set, &question(gpus)).setups.recipe;
                    let fits = other.memory_bytes <= limit_bytes
                        && other.time.hours <= article.within_hours;
                    num_fitting += usize::from(fits);
                    assert!(
                        !fits || other.time.gpu_hours * 1.01 >= cheapest.time.gpu_hours,
                        "{other:?} {cheapest:?}"
                    );
                }
            }
        }
    }
    assert!(num_fitting > 20, "{num_fitting}");
}

#[test]
fn more_hours_allow_fewer_gpus_and_less_money() {
    let within = |hours| {
        let question = Question {
            within_hours: Some(hours),
            ..question(32)
        };
        planned(ARTICLE, &[], &question).setups.cheapest
    };
    let (soon, late, any) = (within(110.0), within(500.0), within(1e6));
    let [soon, late, any] = [soon, late, any].map(Option::unwrap);
    assert_eq!(
        [soon.setup.gpus, late.setup.gpus, any.setup.gpus],
        [32, 8, 1]
    );
    assert!(soon.time.money > late.time.money && late.time.money > any.time.money);
    assert!(late.time.hours <= 500.0);
    assert_eq!(within(50.0), None, "32 GPUs do not suffice");
}

#[test]
fn a_card_too_small_for_the_masters_has_no_set_up_alone() {
    let small = Question {
        hardware: hardware("rtx-4090").unwrap(),
        ..question(1)
    };
    assert_eq!(planned(ARTICLE, &[], &small).setups.cheapest, None);
    let many = Question { gpus: 64, ..small };
    let found = planned(ARTICLE, &[], &many).setups.cheapest.unwrap();
    assert!(found.memory_bytes <= 0.95 * 24e9);
    // Without the sum of gradients nothing is recomputed, but sending after each micro-batch over
    // PCIe takes longer.
    let sent_each = [
        OFF,
        "ranks.sharding=each",
        "train.micro_batch=1",
        "train.micro_batches=4096",
    ];
    let each = planned(ARTICLE, &sent_each, &many);
    assert!(each.memory_bytes <= 0.95 * 24e9);
    assert!(each.time.hours > found.time.hours);
    assert_eq!(found.setup.sharding, Sharding::Once);
    assert_eq!(found.setup.checkpointing, Checkpointing::Budget);
}

/// The published share has its own links in it; where others cost more, their simulation counts.
#[test]
fn slow_links_cost_at_least_their_simulation() {
    let each = [
        "ranks.sharding=each",
        "train.micro_batch=1",
        "train.micro_batches=4096",
    ];
    let with = |name| {
        let question = Question {
            network: network(name).unwrap(),
            ..question(32)
        };
        planned(ARTICLE, &each, &question).time
    };
    let (fast, slow) = (with("ib-400"), with("eth-100"));
    assert!(slow.hours > 1.5 * fast.hours, "{slow:?} {fast:?}");
    assert_eq!(slow.hours, slow.simulated_hours);
    assert!(fast.hours > fast.simulated_hours);
}

/// The recipe beside the article's: the same run, as cheap as the search can make it.
#[test]
fn the_recommended_recipe_is_the_articles_at_the_least_price() {
    let question = question(32);
    let found = planned(RECOMMENDED, &[], &question).setups;
    let cheapest = planned(ARTICLE, &[], &question).setups.cheapest.unwrap();
    near(
        found.recipe.time.money.unwrap(),
        cheapest.time.money.unwrap(),
        0.01,
    );
    assert!(found.recipe.memory_bytes <= found.within_bytes);
    assert_eq!(
        found.cheapest.as_ref(),
        Some(&found.recipe),
        "it stays as it is"
    );
    assert_eq!(found.recipe.setup.micro_batch, cheapest.setup.micro_batch);
}

/// Apart from names, comments and set-up, both recipes are the same run.
#[test]
fn the_recommended_recipe_trains_as_the_articles_does() {
    let load = |recipe: &str| {
        let path = Path::new(RECIPES).join(recipe);
        let mut recipe = Recipe::load(&path, &["run.device=cpu".to_owned()])
            .unwrap()
            .recipe;
        assert_eq!(recipe.train.micro_batch * recipe.train.micro_batches, 4096);
        recipe.train.micro_batch = 1;
        recipe.train.micro_batches = 4096;
        recipe.memory.checkpointing = Checkpointing::Off;
        recipe.memory.budget_gib = None;
        recipe.to_toml()
    };
    assert_eq!(load(RECOMMENDED), load(ARTICLE));
}

/// A step of 4 samples at 1024x1024: all of SDXL's UNet, masters in fp32.
const ONE_CARD: &str = "sdxl-flow-1x24gb.toml";

#[test]
fn a_24_gb_card_is_offered_the_set_up_that_fits() {
    let card = Question {
        hardware: hardware("rtx-4090").unwrap(),
        ..question(1)
    };
    let limit_bytes = (1.0 - FREE_SHARE) * 24e9;
    let ordinary = [
        "optimizer.state=fp32",
        "train.update_in_backward=false",
        "train.micro_batch=1",
        "train.micro_batches=4",
    ];
    let found = planned(ONE_CARD, &ordinary, &card);
    assert!(found.memory_bytes > 24e9, "{}", found.memory_bytes);
    let cheapest = found.setups.cheapest.unwrap();
    assert!(
        cheapest.memory_bytes <= limit_bytes,
        "{}",
        cheapest.memory_bytes
    );
    assert!(cheapest.setup.update.in_backward);
    assert_eq!(
        (cheapest.setup.micro_batch, cheapest.setup.micro_batches),
        (4, 1)
    );
    let is_named = |text: &String| text.contains("guard.skip_by");
    assert!(
        found.assumptions.iter().any(is_named),
        "{:?}",
        found.assumptions
    );

    // The recipe of the repository is that set-up.
    let own = planned(ONE_CARD, &[], &card);
    assert!(own.memory_bytes <= limit_bytes, "{}", own.memory_bytes);
    assert_eq!(own.setups.recipe.setup.update, cheapest.setup.update);
    // Weights with their masters, and moments in 8 bits.
    let giga: f64 = own.memory[..3].iter().map(|term| term.bytes / 1e9).sum();
    near(giga, 6.125 * 2.567_463_684, 1e-6);

    // Nothing is offered to a recipe whose optimiser needs its moments in fp32.
    let stable = [&ordinary[..], &["optimizer.name=stable_adamw"]].concat();
    assert_eq!(planned(ONE_CARD, &stable, &card).setups.cheapest, None);
}
