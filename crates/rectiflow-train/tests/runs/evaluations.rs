//! The test loss: the same number for any batch size, for the weights and for their average.

use rectiflow_train::{Error, eval::evaluate, metrics::Event, run::Options};

use crate::fixture::{Fixture, run_with};

#[test]
fn a_test_loss_does_not_depend_on_the_batch_and_is_the_runs_own() {
    let fixture = Fixture::new();
    let settings = [
        "ema.half_life_samples=40",
        "test.training_samples=13",
        "test.bins=4",
    ];
    let ran = run_with(
        &fixture.recipe("run", &settings),
        Options::default(),
        |_| {},
    );
    let Some(Event::Test(last)) = ran
        .events
        .iter()
        .rev()
        .find(|event| matches!(event, Event::Test(_)))
    else {
        panic!("{:?}", ran.outcome)
    };
    let checkpoint = ran.outcome.as_ref().unwrap().checkpoint.clone().unwrap();
    for micro_batch in ["1", "3", "4", "16"] {
        let set = format!("train.micro_batch={micro_batch}");
        let checked = fixture.recipe("run", &[&settings[..], &[&set]].concat());
        let found = evaluate(&checked, &checkpoint, None).unwrap();
        assert_eq!((found.num_test, found.num_training), (16, 13));
        let averaged = found.ema.expect("an average is kept");
        let pairs = [
            (last.loss, found.trained.test.as_ref().unwrap().loss),
            (
                last.training.as_ref().unwrap().loss,
                found.trained.training.unwrap().loss,
            ),
            (last.ema.as_ref().unwrap().loss, averaged.test.unwrap().loss),
            (
                last.ema_training.as_ref().unwrap().loss,
                averaged.training.unwrap().loss,
            ),
        ];
        for (own, evaluated) in pairs {
            // In the run's own batches it is the same calculation, however the weights are held and
            // wherever they lie.
            assert!(
                micro_batch != "4" || own == evaluated,
                "{own} and {evaluated}"
            );
            assert!(
                (own / evaluated - 1.0).abs() < 1e-6,
                "micro-batch {micro_batch}: {own} and {evaluated}"
            );
        }
        assert!(
            (pairs[0].0 / pairs[2].0 - 1.0).abs() > 1e-4,
            "the average is another model"
        );
        let bins = found.trained.test.unwrap().bins;
        assert_eq!(
            bins.iter().map(|bin| bin.count).collect::<Vec<_>>(),
            [4, 4, 4, 4]
        );
        assert!(bins.iter().all(|bin| bin.standard_error > 0.0));
    }
}

#[test]
fn a_model_of_another_objective_is_refused() {
    let fixture = Fixture::new();
    let checked = fixture.recipe("eps", &["objective.parameterization=eps"]);
    let error = evaluate(&checked, &fixture.base(), None).unwrap_err();
    assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("objective is eps, but this model predicts flow"),
        "{error}"
    );
}
