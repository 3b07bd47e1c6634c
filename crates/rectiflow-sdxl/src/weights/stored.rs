//! Tensors in files, under the names that a model takes them by, in diffusers' shapes.
//!
//! The shards of a folder and a single-file checkpoint are the same here: each name has a file, a
//! name in that file, and the conversion of the tensor read. Tensors are read on request. fp8
//! tensors are read as bf16, with their scales multiplied in (`quantised`).

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result, counted},
    weights::{
        keys::Form,
        quantised::{self, Companion},
        tensor_file::TensorFile,
    },
};

/// Named tensors in files.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    index: BTreeMap<String, StoredTensor>,
    files: Vec<Arc<TensorFile>>,
}

/// The place of a tensor, and its form there.
#[derive(Debug)]
struct StoredTensor {
    file: usize,
    name: String,
    form: Form,
    /// The name in the same file of the number that the tensor is multiplied by.
    scale: Option<String>,
}

impl Stored {
    /// Opens files (shards) with all their tensors, under their own names.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut stored = Self::default();
        for path in paths {
            let file = stored.add_file(Arc::new(TensorFile::open(path)?));
            let names: Vec<String> = stored.files[file].names().map(str::to_owned).collect();
            for name in names {
                stored.add(name.clone(), file, name, Form::Same);
            }
        }
        Ok(stored)
    }

    /// Adds a file without its tensors, and returns its index.
    pub(crate) fn add_file(&mut self, file: Arc<TensorFile>) -> usize {
        self.files.push(file);
        self.files.len() - 1
    }

    /// Adds the tensor `stored` in a file under the name `name`.
    pub(crate) fn add(&mut self, name: String, file: usize, stored: String, form: Form) {
        self.index.insert(
            name,
            StoredTensor {
                file,
                name: stored,
                form,
                scale: None,
            },
        );
    }

    /// Renames every tensor.
    pub(crate) fn rename(&mut self, rename: impl Fn(&str) -> String) {
        for (name, place) in std::mem::take(&mut self.index) {
            self.index.insert(rename(&name), place);
        }
    }

    /// Drops the constants that older programs store with the weights: position ids.
    pub(crate) fn drop_constants(&mut self) {
        self.index.retain(|name, _| !is_constant(name));
    }

    /// Attaches the scales of fp8 weights to them, and drops what else accompanies a weight.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a scale or a format that cannot be read.
    pub(crate) fn attach_scales(&mut self) -> Result<()> {
        let mut companions = Vec::new();
        for name in self.index.keys() {
            if let Some((weight, companion)) = quantised::companion_of(name)
                && self.index.contains_key(&weight)
            {
                companions.push((name.clone(), weight, companion));
            }
        }
        for (name, weight, companion) in companions {
            let place = self.index.remove(&name).expect("it was just listed");
            let problem = match companion {
                Companion::Scale => self.scale_problem(&place, &weight),
                Companion::Format => self.format_problem(&place)?,
                Companion::InputScale => None,
            };
            if let Some(reason) = problem {
                return Err(self.unreadable(&place, &reason));
            }
            if companion == Companion::Scale {
                let weight = self.index.get_mut(&weight).expect("it is in the index");
                weight.scale = Some(place.name);
            }
        }
        Ok(())
    }

    /// Returns why a scale cannot be multiplied into a weight.
    fn scale_problem(&self, scale: &StoredTensor, weight: &str) -> Option<String> {
        let weight = &self.index[weight];
        let kind = self.files[weight.file].kind(&weight.name);
        if !kind.is_some_and(quantised::is_fp8) {
            let kind = self.files[weight.file].dtype_name(&weight.name);
            return Some(format!(
                "it scales {}, which has dtype {kind}; only scaled fp8 can be read",
                weight.name
            ));
        }
        if scale.file != weight.file {
            return Some(format!("it is in another file than {}", weight.name));
        }
        let shape = self.files[scale.file]
            .shape(&scale.name)
            .unwrap_or_default();
        let num_values: i64 = shape.iter().product();
        (num_values != 1).then(|| {
            format!("it has shape {shape:?}; only one scale for a whole tensor can be read")
        })
    }

    /// Returns why the format that a tensor describes cannot be read.
    fn format_problem(&self, format: &StoredTensor) -> Result<Option<String>> {
        let bytes = self.files[format.file].bytes(&format.name);
        match serde_json::from_slice(bytes.unwrap_or_default()) {
            Ok(format) => Ok(quantised::format_problem(&format)),
            Err(error) => Err(self.unreadable(format, &format!("it is not JSON: {error}"))),
        }
    }

    fn unreadable(&self, place: &StoredTensor, reason: &str) -> Error {
        let what = "use the fp16 or bf16 file that it was made from";
        Error::Malformed {
            path: self.files[place.file].path().to_owned(),
            kind: "model",
            reason: format!("tensor {}: {reason}; {what}", place.name),
        }
    }

    /// Describes the tensors in fp8 in a sentence; `None` if there are none.
    pub(crate) fn fp8_note(&self, part: &str) -> Option<String> {
        let mut num_fp8 = 0;
        let mut num_scaled = 0;
        for place in self.index.values() {
            if self.files[place.file]
                .kind(&place.name)
                .is_some_and(quantised::is_fp8)
            {
                num_fp8 += 1;
                num_scaled += usize::from(place.scale.is_some());
            }
        }
        if num_fp8 == 0 {
            return None;
        }
        let verb = if num_fp8 == 1 { "is" } else { "are" };
        let tensors = counted(num_fp8, "tensor");
        let scaled = match num_scaled {
            0 => String::new(),
            n => format!("; {n} of them with a scale, which is multiplied in and rounded to bf16"),
        };
        Some(format!(
            "{tensors} of the {part} {verb} stored in fp8 and read as bf16, which holds the same \
             values{scaled}; what fp8 lost is not restored"
        ))
    }

    /// Returns the names, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// Returns the paths of the files, for messages.
    pub(crate) fn description(&self) -> String {
        let mut paths = Vec::new();
        for file in &self.files {
            paths.push(file.path().display().to_string());
        }
        paths.join(", ")
    }

    /// Returns a tensor's shape in diffusers' layout; `None` if there is no such tensor or its
    /// shape cannot be converted.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<i64>> {
        let place = self.index.get(name)?;
        place
            .form
            .diffusers_shape(self.files[place.file].shape(&place.name)?)
    }

    /// Returns the dtype that a tensor is read as; `None` if there is no such tensor or libtorch
    /// lacks the dtype.
    pub(crate) fn kind(&self, name: &str) -> Option<Kind> {
        let place = self.index.get(name)?;
        self.files[place.file]
            .kind(&place.name)
            .map(quantised::read_as)
    }

    /// Returns a copy of a tensor in diffusers' shape, in the dtype [`Self::kind`], or in fp32 if
    /// it has a scale.
    pub(crate) fn load(&self, name: &str) -> Result<Tensor> {
        let Some(place) = self.index.get(name) else {
            let what = format!("{}: {name}", self.description());
            return Err(Error::input(what, "a tensor", "none of that name"));
        };
        let file = &self.files[place.file];
        let tensor = file.tensor(&place.name)?;
        let scale = match &place.scale {
            Some(scale) => Some(file.tensor(scale)?),
            None => None,
        };
        let path = file.path().display();
        widened(tensor, scale.as_ref())
            .and_then(|tensor| in_diffusers_form(tensor, place.form))
            .map_err(Error::torch(format!("{path}: converting {}", place.name)))
    }

    /// Returns a tensor's file and its name there, if it needs no conversion of its shape or dtype.
    pub(crate) fn place_as_is(&self, name: &str) -> Option<(&Arc<TensorFile>, &str)> {
        let place = self
            .index
            .get(name)
            .filter(|place| place.form == Form::Same)?;
        let file = &self.files[place.file];
        let is_as_stored = file.kind(&place.name) == self.kind(name);
        is_as_stored.then_some((file, &place.name))
    }

    /// Removes a tensor from the index.
    pub(crate) fn forget(&mut self, name: &str) {
        self.index.remove(name);
    }
}

/// Returns true for the name of a constant that some programs store among CLIP's weights.
pub(crate) fn is_constant(name: &str) -> bool {
    name.ends_with("position_ids")
}

/// Returns a tensor in a dtype that can be calculated with: fp8 as bf16, scaled fp8 as fp32 times
/// its scale.
fn widened(tensor: Tensor, scale: Option<&Tensor>) -> std::result::Result<Tensor, tch::TchError> {
    match scale {
        None => tensor.f_to_kind(quantised::read_as(tensor.kind())),
        Some(scale) => {
            let scale = scale.f_to_kind(Kind::Float)?.f_reshape([1i64; 0])?;
            tensor.f_to_kind(Kind::Float)?.f_mul(&scale)
        }
    }
}

/// Returns a single file's tensor in diffusers' shape.
fn in_diffusers_form(tensor: Tensor, form: Form) -> std::result::Result<Tensor, tch::TchError> {
    let made = match form {
        Form::Same => return Ok(tensor),
        Form::Transposed => tensor.f_tr()?,
        Form::Pointwise => {
            let size = tensor.size();
            tensor.f_reshape(&size[..2])?
        }
        Form::Stacked { index, of } => {
            let rows = tensor.size()[0] / of as i64;
            tensor.f_narrow(0, index as i64 * rows, rows)?
        }
    };
    made.f_contiguous()
}
