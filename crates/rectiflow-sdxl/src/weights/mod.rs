//! Named tensors, and the parameters of a model built from them.
//!
//! A model takes each tensor by its upstream name, with the shape that its configuration implies
//! and the initial distribution for a model without weights. Problems are collected, so that one
//! report describes a wrong file. `Weights` exists while a model is built. `Parameters` remains:
//! the tensors by name, sharing storage with the model, for the optimiser, the checkpoint and the
//! export.
//!
//! Not here: names of other layouts (`keys`), the files of a model (`model`).

pub mod component;
mod header_problem;
pub mod init;
pub mod keys;
pub(crate) mod mapped;
pub(crate) mod quantised;
pub(crate) mod stored;
pub mod tensor_file;

use std::{
    collections::BTreeMap,
    fmt::Display,
    path::{Path, PathBuf},
};

use tch::{Device, Kind, Tensor};

use crate::{
    error::{Error, Result, WeightProblems},
    torch::{allocator::pack_tensors, counting, write::f_write_to},
    weights::{
        init::Init,
        mapped::Mapped,
        stored::{Stored, is_constant},
        tensor_file::write_tensors,
    },
};

/// The tensors available to a model under construction.
#[derive(Debug)]
pub struct Weights {
    source: Source,
    kind: Kind,
    device: Device,
    /// Whether tensors can be views of their files.
    may_map: bool,
    parameters: Parameters,
    problems: WeightProblems,
}

/// The source of the tensors.
#[derive(Debug)]
enum Source {
    /// Read from files.
    Files(Stored),
    /// Drawn from a seed.
    Random(u64),
    /// Shapes without storage.
    Shapes,
}

impl Weights {
    fn new(source: Source, description: String, kind: Kind, device: Device) -> Self {
        // Every model passes here before its first tensor.
        pack_tensors();
        let problems = WeightProblems {
            source: description,
            ..WeightProblems::default()
        };
        Self {
            source,
            kind,
            device,
            may_map: false,
            parameters: Parameters::default(),
            problems,
        }
    }

    /// Opens one or more safetensors files (shards), whose tensors are converted to `kind` on
    /// `device` when taken.
    ///
    /// # Errors
    /// As [`crate::tensor_file::TensorFile::open`].
    pub fn open(paths: &[PathBuf], kind: Kind, device: Device) -> Result<Self> {
        Ok(Self::of_files(Stored::open(paths)?, kind, device))
    }

    /// Returns the tensors of files, each converted to `kind` on `device` when taken.
    pub(crate) fn of_files(stored: Stored, kind: Kind, device: Device) -> Self {
        let description = stored.description();
        Self::new(Source::Files(stored), description, kind, device)
    }

    /// Allows tensors to be views of their files where possible; they must not be written then.
    pub(crate) fn map(mut self, may_map: bool) -> Self {
        self.may_map = may_map;
        self
    }

    /// Returns random initial weights: a pure function of the seed and each tensor's name.
    pub fn random(seed: u64, kind: Kind, device: Device) -> Self {
        Self::new(
            Source::Random(seed),
            format!("random weights of seed {seed}"),
            kind,
            device,
        )
    }

    /// Returns shapes without storage, for counting and planning. A model of them cannot run.
    pub fn shapes_only() -> Self {
        Self::new(Source::Shapes, "shapes".into(), Kind::Float, Device::Cpu)
    }

    /// Returns tensors whose numbers are not set, on the device that has none
    /// ([`crate::counting`]).
    pub fn without_numbers(kind: Kind) -> Self {
        Self::new(Source::Shapes, "shapes".into(), kind, counting::DEVICE)
    }

    /// Returns the names not taken yet, sorted; none without files.
    pub fn names(&self) -> Vec<&str> {
        match &self.source {
            Source::Files(stored) => stored.names().collect(),
            Source::Random(_) | Source::Shapes => Vec::new(),
        }
    }

    /// Renames every tensor, before any is taken.
    pub fn rename(&mut self, rename: impl Fn(&str) -> String) {
        if let Source::Files(stored) = &mut self.source {
            stored.rename(rename);
        }
    }

    /// Changes the dtype of the tensors, before any is taken.
    pub(crate) fn convert_to(&mut self, kind: Kind) {
        self.kind = kind;
    }

    /// Returns the dtype that tensors are converted to.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the device that tensors are moved to.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Returns the root of the names.
    pub fn root(&mut self) -> Scope<'_> {
        Scope {
            weights: self,
            prefix: String::new(),
        }
    }

    /// Takes the tensor `name`. If it is missing or does not fit, the problem is recorded, the
    /// result is a placeholder without storage, and [`Weights::finish`] fails.
    pub fn take(&mut self, name: &str, shape: &[i64], init: Init) -> Tensor {
        let tensor =
            tch::no_grad(|| self.make(name, shape, init)).unwrap_or_else(|| placeholder(shape));
        self.parameters
            .tensors
            .insert(name.to_owned(), tensor.shallow_clone());
        tensor
    }

    fn make(&mut self, name: &str, shape: &[i64], init: Init) -> Option<Tensor> {
        match &mut self.source {
            Source::Shapes if self.device == counting::DEVICE => {
                Some(Tensor::empty(shape, (self.kind, self.device)))
            }
            Source::Shapes => Some(placeholder(shape)),
            Source::Random(seed) => {
                let num_values = shape.iter().product::<i64>() as usize;
                let values = Tensor::from_slice(&init.values(*seed, name, num_values));
                self.place(name, &values.reshape(shape))
            }
            Source::Files(stored) => {
                let kind = (self.may_map && self.device == Device::Cpu).then_some(self.kind);
                let found = found_in(stored, name, shape, kind, &mut self.parameters.mapped);
                stored.forget(name);
                self.fitting(name, shape, found)
            }
        }
    }

    /// Returns the tensor found, checked and placed; otherwise records the problem.
    fn fitting(&mut self, name: &str, shape: &[i64], found: Found) -> Option<Tensor> {
        let problems = &mut self.problems;
        let name = name.to_owned();
        match found {
            Found::Tensor(tensor) => return self.checked(&name, &tensor),
            Found::Nothing => problems.missing.push((name, shape.to_vec())),
            Found::Misshapen(size) => problems.misshapen.push((name, shape.to_vec(), size)),
            Found::Unusable(reason) => problems.unusable.push((name, reason)),
        }
        None
    }

    /// Returns the tensor, converted and moved; `None` if a value is not finite.
    fn checked(&mut self, name: &str, tensor: &Tensor) -> Option<Tensor> {
        let is_finite = is_finite(tensor);
        self.parameters.mapped.release_pages(name);
        if !is_finite {
            self.problems.unusable.push((
                name.to_owned(),
                "holds values that are not finite (NaN or infinity)".into(),
            ));
            return None;
        }
        self.place(name, tensor)
    }

    fn place(&mut self, name: &str, tensor: &Tensor) -> Option<Tensor> {
        match tensor
            .f_to_kind(self.kind)
            .and_then(|t| t.f_to_device(self.device))
        {
            Ok(placed) => Some(placed),
            Err(error) => {
                let reason = Error::torch("cannot be placed")(error).to_string();
                self.problems.unusable.push((name.to_owned(), reason));
                None
            }
        }
    }

    /// Returns the parameters taken, if each was present and fitted and none is left over.
    /// Constants in older files (`position_ids`) are ignored.
    ///
    /// # Errors
    /// [`Error::Weights`] with all missing, unexpected, misshapen or unusable tensors.
    pub fn finish(mut self) -> Result<Parameters> {
        if let Source::Files(stored) = &self.source {
            for name in stored.names().filter(|name| !is_constant(name)) {
                self.problems
                    .unexpected
                    .push((name.to_owned(), stored.shape(name).unwrap_or_default()));
            }
        }
        if self.problems.is_empty() {
            Ok(self.parameters)
        } else {
            Err(Error::Weights(Box::new(self.problems)))
        }
    }
}

enum Found {
    Tensor(Tensor),
    Nothing,
    Misshapen(Vec<i64>),
    Unusable(String),
}

/// Finds a tensor in files: a view if the map is allowed and the dtype is right, otherwise a copy.
fn found_in(
    stored: &Stored,
    name: &str,
    shape: &[i64],
    map: Option<Kind>,
    mapped: &mut Mapped,
) -> Found {
    match stored.shape(name) {
        None => return Found::Nothing,
        Some(size) if size != shape => return Found::Misshapen(size),
        Some(_) => {}
    }
    match read(stored, name, map, mapped) {
        Ok(tensor) if tensor.is_floating_point() => Found::Tensor(tensor),
        Ok(tensor) => Found::Unusable(format!(
            "has dtype {:?}, expected a floating-point dtype",
            tensor.kind()
        )),
        Err(error) => Found::Unusable(format!("cannot be read: {error}")),
    }
}

/// Returns a view of a tensor in its file if it has the dtype `map`, otherwise a copy.
fn read(stored: &Stored, name: &str, map: Option<Kind>, mapped: &mut Mapped) -> Result<Tensor> {
    match stored.place_as_is(name) {
        Some((file, stored_name)) if map.is_some() && stored.kind(name) == map => {
            mapped.insert(name, file.clone(), stored_name);
            file.mapped(stored_name)
        }
        _ => stored.load(name),
    }
}

/// Returns a tensor of this shape over four bytes of storage.
fn placeholder(shape: &[i64]) -> Tensor {
    Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand(shape, false)
}

/// Returns true if all values are finite. The tensor is examined in pieces that fit the cache:
/// torch widens what it sums, and the allocator keeps temporary tensors of a model's largest size.
/// A finite sum proves finite values; otherwise the sum can have overflowed, and the values
/// themselves are tested.
pub(crate) fn is_finite(tensor: &Tensor) -> bool {
    const PIECE: i64 = 1 << 18;
    tensor.flatten(0, -1).split(PIECE, 0).iter().all(|piece| {
        piece.sum(Kind::Float).double_value(&[]).is_finite()
            || piece.isfinite().all().int64_value(&[]) != 0
    })
}

/// A level in the hierarchy of names.
#[derive(Debug)]
pub struct Scope<'a> {
    weights: &'a mut Weights,
    prefix: String,
}

impl Scope<'_> {
    /// Returns the level `name` below this one.
    pub fn sub(&mut self, name: impl Display) -> Scope<'_> {
        let prefix = format!("{}{name}.", self.prefix);
        Scope {
            weights: self.weights,
            prefix,
        }
    }

    /// Returns the full name of this level, without the last dot.
    pub(crate) fn name(&self) -> &str {
        self.prefix.trim_end_matches('.')
    }

    /// Returns the tensors taken at this level and below, in the order of their names.
    pub(crate) fn taken(&self) -> Vec<Tensor> {
        let from_here = self.weights.parameters.tensors.range(self.prefix.clone()..);
        let here = from_here.take_while(|(name, _)| name.starts_with(&self.prefix));
        here.map(|(_, tensor)| tensor.shallow_clone()).collect()
    }

    /// Takes a tensor at this level; see [`Weights::take`].
    pub fn take(&mut self, name: &str, shape: &[i64], init: Init) -> Tensor {
        self.weights
            .take(&format!("{}{name}", self.prefix), shape, init)
    }
}

/// A model's tensors by their upstream names, in the order of the names. They share storage with
/// the model: an in-place update of one changes the model.
#[derive(Debug, Default)]
pub struct Parameters {
    tensors: BTreeMap<String, Tensor>,
    mapped: Mapped,
}

impl Parameters {
    /// Returns names and tensors, in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Returns the tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Returns true if there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Returns the number of elements of all tensors.
    pub fn num_elements(&self) -> usize {
        self.tensors.values().map(Tensor::numel).sum()
    }

    /// Releases the pages of mapped tensors whose names begin with `prefix` from this process's
    /// memory until their next access. Other tensors are unaffected.
    pub(crate) fn release_pages(&self, prefix: &str) {
        self.mapped.release_pages(prefix);
    }

    /// Sets whether autograd records operations on the tensors; at first it does not.
    pub fn set_requires_grad(&self, requires_grad: bool) {
        for tensor in self.tensors.values() {
            let _same_tensor = tensor.set_requires_grad(requires_grad);
        }
    }

    /// Writes the tensors as one safetensors file, atomically and with deterministic bytes. `kind`
    /// converts them; `None` keeps their dtypes.
    ///
    /// # Errors
    /// As [`write_tensors`].
    pub fn save(&self, path: &Path, kind: Option<Kind>) -> Result<()> {
        self.save_with(path, kind, &[])
    }

    /// As [`Parameters::save`], with additional `metadata` in the header.
    ///
    /// # Errors
    /// As [`write_tensors`].
    pub fn save_with(
        &self,
        path: &Path,
        kind: Option<Kind>,
        metadata: &[(&str, &str)],
    ) -> Result<()> {
        write_tensors(
            path,
            self.iter(),
            kind,
            &[&[("format", "pt")], metadata].concat(),
        )
    }

    /// Overwrites the values with those of a file that has exactly these names and shapes.
    ///
    /// # Errors
    /// As [`Weights::open`] and [`Weights::finish`]; no value is changed then.
    pub fn load(&self, path: &Path) -> Result<()> {
        let mut weights = Weights::open(&[path.to_owned()], Kind::Float, Device::Cpu)?;
        let values: Vec<_> = self
            .iter()
            .map(|(name, own)| (weights.take(name, &own.size(), Init::Zeros), own))
            .collect();
        weights.finish()?;
        for (value, own) in values {
            f_write_to(own, &value).map_err(Error::torch(format!("loading {}", path.display())))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::weights::tensor_file::TensorFile;

    const CPU: Device = Device::Cpu;

    fn file(folder: &Path, tensors: &[(&str, Tensor)]) -> PathBuf {
        let path = folder.join("weights.safetensors");
        write_tensors(
            &path,
            tensors.iter().map(|(name, tensor)| (*name, tensor)),
            None,
            &[],
        )
        .unwrap();
        path
    }

    #[test]
    fn every_problem_is_in_one_report() {
        let folder = tempfile::tempdir().unwrap();
        let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, CPU));
        let path = file(
            folder.path(),
            &[
                ("good", ones(&[2])),
                ("shape", ones(&[2, 3])),
                ("extra", ones(&[5])),
                ("nan", ones(&[2]) * f64::NAN),
                ("ids", Tensor::from_slice(&[1i64])),
                (
                    "text_model.embeddings.position_ids",
                    Tensor::from_slice(&[0i64]),
                ),
            ],
        );
        let mut weights = Weights::open(std::slice::from_ref(&path), Kind::Float, CPU).unwrap();
        for (name, shape) in [
            ("good", vec![2]),
            ("shape", vec![3, 2]),
            ("gone", vec![4]),
            ("nan", vec![2]),
            ("ids", vec![1]),
        ] {
            assert_eq!(weights.take(name, &shape, Init::Zeros).size(), shape);
        }
        let Err(Error::Weights(problems)) = weights.finish() else {
            panic!("must be refused")
        };
        assert_eq!(problems.missing, [("gone".to_owned(), vec![4])]);
        assert_eq!(problems.unexpected, [("extra".to_owned(), vec![5])]);
        assert_eq!(
            problems.misshapen,
            [("shape".to_owned(), vec![3, 2], vec![2, 3])]
        );
        assert_eq!(
            problems
                .unusable
                .iter()
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>(),
            ["nan", "ids"]
        );
        assert!(problems.to_string().contains(path.to_str().unwrap()));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_models_tensors_are_packed() {
        use crate::torch::allocator::reach;

        let mut weights = Weights::random(1, Kind::Float, CPU);
        let _in_memory = weights.take("w", &[32 << 20], Init::Zeros);
        assert!(
            reach() >= 128 << 20,
            "they lie in the region that the command packs tensors into"
        );
    }

    #[test]
    fn random_weights_do_not_depend_on_the_order_of_construction() {
        let init = Init::Normal { std: 1.0 };
        let take = |names: &[&str]| {
            let mut weights = Weights::random(3, Kind::Float, CPU);
            for name in names {
                let _kept_in_weights = weights.take(name, &[4, 4], init);
            }
            weights.finish().unwrap()
        };
        let (one, two) = (take(&["a", "b"]), take(&["b", "c", "a"]));
        for name in ["a", "b"] {
            assert!(one.get(name).unwrap().equal(two.get(name).unwrap()));
        }
        assert!(!one.get("a").unwrap().equal(one.get("b").unwrap()));
    }

    #[test]
    fn half_precision_files_are_read_as_asked_and_saved_as_asked() {
        let folder = tempfile::tempdir().unwrap();
        let values = Tensor::from_slice(&[0.5f32, -1.25, 3.0]);
        for kind in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
            let path = file(folder.path(), &[("w", values.to_kind(kind))]);
            let mut weights = Weights::open(&[path], Kind::Float, CPU).unwrap();
            assert!(weights.take("w", &[3], Init::Zeros).equal(&values));
            let saved = folder.path().join("saved");
            weights.finish().unwrap().save(&saved, Some(kind)).unwrap();
            assert_eq!(TensorFile::open(&saved).unwrap().kind("w"), Some(kind));
        }
    }

    #[test]
    fn mapped_weights_are_the_files_and_come_back_when_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let values = Tensor::arange(100_000, (Kind::BFloat16, CPU));
        let path = file(
            folder.path(),
            &[
                ("a.w", values.shallow_clone()),
                ("nan", Tensor::from_slice(&[f32::NAN])),
            ],
        );
        let open = |kind| {
            Weights::open(std::slice::from_ref(&path), kind, CPU)
                .unwrap()
                .map(true)
        };
        let mut weights = open(Kind::BFloat16);
        let taken = weights.take("a.w", &[100_000], Init::Zeros);
        weights.parameters.release_pages("a.");
        assert!(taken.equal(&values));
        assert!(!weights.parameters.mapped.is_empty());
        // A deleted file stays readable while a view of it exists.
        drop(weights);
        std::fs::remove_file(&path).unwrap();
        assert!(taken.equal(&values));
        let path = file(
            folder.path(),
            &[
                ("a.w", values.shallow_clone()),
                ("nan", Tensor::from_slice(&[f32::NAN])),
            ],
        );
        let mut weights = Weights::open(&[path], Kind::Float, CPU).unwrap().map(true);
        assert!(
            weights
                .take("a.w", &[100_000], Init::Zeros)
                .equal(&values.to_kind(Kind::Float))
        );
        assert!(
            weights.parameters.mapped.is_empty(),
            "another dtype is a copy"
        );
        let _ = weights.take("nan", &[1], Init::Zeros);
        assert!(
            matches!(weights.finish(), Err(Error::Weights(_))),
            "mapped weights are checked too"
        );
    }

    #[test]
    fn parameters_share_storage_gradients_and_survive_a_load() {
        let folder = tempfile::tempdir().unwrap();
        let mut weights = Weights::random(1, Kind::Float, CPU);
        let taken = weights.take("w", &[3], Init::Normal { std: 1.0 });
        let parameters = weights.finish().unwrap();
        parameters.set_requires_grad(true);
        (&taken * 2.0).sum(Kind::Float).backward();
        assert!(
            parameters
                .get("w")
                .unwrap()
                .grad()
                .equal(&Tensor::from_slice(&[2f32; 3]))
        );
        let path = file(
            folder.path(),
            &[("w", Tensor::from_slice(&[1f32, 2.0, 3.0]))],
        );
        parameters.load(&path).unwrap();
        assert!(taken.detach().equal(&Tensor::from_slice(&[1f32, 2.0, 3.0])));
        let wrong = file(folder.path(), &[("v", Tensor::from_slice(&[1f32]))]);
        assert!(parameters.load(&wrong).is_err());
        assert!(
            taken.detach().equal(&Tensor::from_slice(&[1f32, 2.0, 3.0])),
            "a failed load changes nothing"
        );
    }
}
