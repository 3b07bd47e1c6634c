//! What a run measures of its model at intervals: the test loss and the preview pictures.

use std::time::Instant;

use crate::{
    error::Result,
    measure::{
        metrics::{Event, TestMetrics},
        testloss::{Losses, Tables},
    },
    pictures::preview::Previewer,
    ranks::exchange::Exchange,
    run::setup::Parts,
    state::TrainState,
    step::Stepper,
};

/// Measures the test loss and samples previews. Methods return the event to record, if there is
/// one.
pub(super) struct Measurer<'a> {
    parts: Parts<'a>,
    tables: Tables,
    previewer: Previewer,
}

impl<'a> Measurer<'a> {
    /// Creates the tables and the previewer that the recipe asks for.
    pub(super) fn new(parts: Parts<'a>) -> Result<Self> {
        let recipe = &parts.checked.recipe;
        let previewer = Previewer::new(&recipe.preview, &recipe.run.dir);
        Ok(Self {
            tables: Tables::new(parts.checked, parts.sources)?,
            previewer,
            parts,
        })
    }

    /// Returns the number of test samples.
    pub(super) fn num_test(&self) -> u64 {
        self.tables.test.len() as u64
    }

    /// Returns the losses of the trained and the averaged weights on the fixed tables; `None` if
    /// there are no test samples.
    pub(super) fn test_loss(
        &self,
        state: &TrainState,
        stepper: &Stepper<'_>,
        exchange: &Exchange<'_>,
    ) -> Result<Option<Event>> {
        let began = Instant::now();
        let Parts { sources, comm, .. } = self.parts;
        let _doing = comm.long("measuring the test loss");
        exchange.wait_gathers()?;
        let Losses {
            test: Some(test),
            training,
        } = self.tables.measure(stepper, sources, comm)?
        else {
            return Ok(None);
        };
        let averaged = self.averaged_losses(state, stepper, exchange)?;
        Ok(Some(Event::Test(TestMetrics {
            step: state.position.cursor,
            samples: state.position.samples,
            loss: test.loss,
            bins: test.bins,
            training,
            ema: averaged.test,
            ema_training: averaged.training,
            secs: began.elapsed().as_secs_f64(),
        })))
    }

    /// Returns the losses of the averaged weights; none if the run does not average.
    fn averaged_losses(
        &self,
        state: &TrainState,
        stepper: &Stepper<'_>,
        exchange: &Exchange<'_>,
    ) -> Result<Losses> {
        if state.average.is_none() {
            return Ok(Losses {
                test: None,
                training: None,
            });
        }
        let Parts { sources, comm, .. } = self.parts;
        exchange.swap_average(state, &stepper.workers)?;
        let losses = self.tables.measure(stepper, sources, comm);
        exchange.swap_average(state, &stepper.workers)?;
        losses
    }

    /// Samples the preview pictures; `None` if the recipe has no prompts.
    pub(super) fn preview(&self, step: u64, exchange: &Exchange<'_>) -> Result<Option<Event>> {
        let began = Instant::now();
        let Parts {
            model,
            checked,
            comm,
            ..
        } = self.parts;
        let _doing = comm.long("drawing the previews");
        exchange.wait_gathers()?;
        let name = self.previewer.draw(model, checked, step, comm)?;
        Ok(name.map(|name| Event::Preview {
            step,
            name,
            secs: began.elapsed().as_secs_f64(),
        }))
    }
}
