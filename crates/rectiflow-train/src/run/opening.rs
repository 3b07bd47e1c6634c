//! What a run opens first: its folder with the mirror, and the model that it begins from.

use rectiflow_sdxl::model::Model;

use crate::{
    checkpoint::{Checkpoints, components::Components, model},
    error::Result,
    ranks::comm::Comm,
    recipe::Checked,
    run::{
        mirroring::{self, Afterwards},
        options::Options,
        origin::Origin,
        setup::{check_same_start, open_folder},
    },
};

/// Opens the run folder, brings it up to date with the mirror, if there is one, and starts the
/// mirror's thread. Returns the reason of a stop that is acknowledged.
///
/// # Errors
/// As [`open_folder`] and [`check_same_start`]; those of a mirror that cannot be used, if the
/// folder has no checkpoint.
pub(super) fn open_run(
    checked: &Checked,
    comm: &Comm,
    checkpoints: &Checkpoints,
    options: &Options<'_>,
    afterwards: &mut Afterwards,
) -> Result<Option<String>> {
    let run_dir = &checked.recipe.run.dir;
    let sides = mirroring::sides(checked, checkpoints)?;
    let doing = comm.long("opening the run and its mirror");
    let mut is_usable = false;
    let meet = || {
        if let Some(sides) = &sides {
            is_usable = mirroring::meet(sides)?;
        }
        Ok(())
    };
    let (lock, acknowledged) = open_folder(run_dir, comm, options.acknowledge_stop, meet)?;
    afterwards.lock = lock;
    check_same_start(comm, &checked.recipe)?;
    comm.first(|| checkpoints.clean())?;
    if let Some(sides) = sides {
        comm.first(|| {
            if is_usable {
                mirroring::catch_up(&sides)?;
            }
            Ok(())
        })?;
        if comm.is_first() {
            afterwards.start(sides);
        }
    }
    drop(doing);
    Ok(acknowledged)
}

/// Opens the model that the run begins from.
///
/// # Errors
/// [`crate::Error::Model`].
pub(super) fn open_model(
    checked: &Checked,
    origin: &Origin,
    components: &Components,
) -> Result<Model> {
    // A resumed run or a branch has weights for every component.
    let random = match origin {
        Origin::Base => &checked.random[..],
        Origin::Resume(..) | Origin::Branch(..) => &[],
    };
    let options = model::base_options(checked.device, random, checked.recipe.run.seed);
    let model = model::open_components(components, &options)?;
    checked.objective.check_base(model.parameterization)?;
    Ok(model)
}
