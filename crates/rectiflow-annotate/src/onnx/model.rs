//! A model that looks at pictures: opened, checked and run.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use half::f16;
use ort::{
    session::{
        Session,
        builder::{GraphOptimizationLevel, SessionBuilder},
    },
    value::{DynValueRef, TensorRef, ValueType},
};
use rectiflow_data::error::Error as DataError;
use xxhash_rust::xxh3::Xxh3;

use crate::{
    error::{Error, Result},
    onnx::{
        input::{self, Input, Said},
        output::{self, Output},
        preparation::Elements,
        runtime::{self, Places},
    },
};

/// What computes a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU by number, in programs that are built with the feature `cuda`.
    Cuda(i32),
}

/// How a model is opened.
#[derive(Debug, Clone)]
pub struct Choices {
    /// What the model's file leaves open.
    pub input: Said,
    /// The output that is read; the first if None.
    pub output: Option<String>,
    /// What computes.
    pub device: Device,
    /// Threads on the processor.
    pub threads: usize,
}

/// A model with a picture as its input, and a number or logits as its output.
#[derive(Debug)]
pub struct Model {
    path: PathBuf,
    session: Session,
    input: Input,
    /// Name of the output that is read.
    output: String,
    /// Numbers a picture.
    width: usize,
}

/// What a model returned for some pictures.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    /// Numbers a picture.
    pub width: usize,
    /// `width` numbers for each picture.
    pub numbers: Vec<f32>,
}

impl Rows {
    /// The numbers of a picture.
    pub fn row(&self, number: usize) -> &[f32] {
        &self.numbers[number * self.width..(number + 1) * self.width]
    }
}

impl Model {
    /// Opens the model in a file.
    ///
    /// # Errors
    /// [`Error::NoRuntime`]; [`Error::Model`] if the file is no model, or one that does not look
    /// at pictures.
    pub fn open(path: &Path, choices: &Choices, places: &Places) -> Result<Self> {
        let refused = |reason: String| Error::Model {
            path: path.to_owned(),
            reason,
        };
        if !path.is_file() {
            return Err(refused("there is no such file".to_owned()));
        }
        let environment = runtime::environment(places)?;
        let builder = Session::builder(environment).map_err(|error| refused(one_line(&error)))?;
        let mut builder = with_choices(builder, choices).map_err(refused)?;
        let session = builder.commit_from_file(path).map_err(|error| {
            refused(format!(
                "ONNX Runtime {} cannot open it as a model: {}",
                runtime::VERSION,
                one_line(&error)
            ))
        })?;
        let input = input_of(&session, choices.input).map_err(refused)?;
        let output = Output::of(&outputs_of(&session), choices.output.as_deref());
        let mut model = Self {
            path: path.to_owned(),
            input,
            output: output.map_err(refused)?.name,
            width: 0,
            session,
        };
        model.width = model.probe()?;
        Ok(model)
    }

    /// Runs the model once on zeros, so that one that cannot run is found out at once. Returns the
    /// numbers a picture.
    fn probe(&mut self) -> Result<usize> {
        let num_slots = if self.input.is_fixed {
            self.input.batch
        } else {
            1
        };
        let mut zeros = Elements::empty(self.input.element);
        zeros.clear_to(num_slots * self.input.elements());
        Ok(self.run(&zeros, num_slots)?.width)
    }

    /// What it takes.
    pub fn input(&self) -> &Input {
        &self.input
    }

    /// Numbers a picture.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Runs the model on the elements of `num_slots` pictures.
    ///
    /// # Errors
    /// [`Error::Model`] if it fails, or returns another number of rows.
    pub fn run(&mut self, elements: &Elements, num_slots: usize) -> Result<Rows> {
        let shape = self.input.shape(num_slots);
        let numbers = self.numbers(elements, shape).and_then(|numbers| {
            match !numbers.is_empty() && numbers.len().is_multiple_of(num_slots) {
                true => Ok(numbers),
                false => Err(format!("it returned {} numbers", numbers.len())),
            }
        });
        let hint = match num_slots {
            1 => "",
            _ => "; a model that is made for one picture at a time needs --batch 1",
        };
        let numbers = numbers.map_err(|reason| Error::Model {
            path: self.path.clone(),
            reason: format!("it fails on pictures of shape {shape:?}: {reason}{hint}"),
        })?;
        Ok(Rows {
            width: numbers.len() / num_slots,
            numbers,
        })
    }

    /// All numbers of the output.
    fn numbers(
        &mut self,
        elements: &Elements,
        shape: [i64; 4],
    ) -> std::result::Result<Vec<f32>, String> {
        let tensor = tensor_of(elements, shape).map_err(|error| one_line(&error))?;
        let inputs = ort::inputs![self.input.name.as_str() => tensor];
        let outputs = self.session.run(inputs).map_err(|error| one_line(&error))?;
        let output = &outputs[self.output.as_str()];
        if let Ok((_, numbers)) = output.try_extract_tensor::<f32>() {
            return Ok(numbers.to_vec());
        }
        let halves = output.try_extract_tensor::<f16>();
        let (_, halves) = halves.map_err(|error| one_line(&error))?;
        Ok(halves.iter().map(|half| half.to_f32()).collect())
    }
}

/// The elements as a tensor, which borrows them.
fn tensor_of(elements: &Elements, shape: [i64; 4]) -> ort::Result<DynValueRef<'_>> {
    match elements {
        Elements::F32(values) => {
            TensorRef::from_array_view((shape, values.as_slice())).map(TensorRef::into_dyn)
        }
        Elements::F16(values) => {
            TensorRef::from_array_view((shape, values.as_slice())).map(TensorRef::into_dyn)
        }
        Elements::U8(values) => {
            TensorRef::from_array_view((shape, values.as_slice())).map(TensorRef::into_dyn)
        }
    }
}

/// Python's onnxruntime optimises as much. Threads that wait for work sleep, because other threads
/// open pictures meanwhile.
fn with_choices(
    builder: SessionBuilder,
    choices: &Choices,
) -> std::result::Result<SessionBuilder, String> {
    let said = |error: ort::Error<SessionBuilder>| one_line(&error);
    let level = GraphOptimizationLevel::All;
    let builder = builder.with_optimization_level(level).map_err(said)?;
    let threads = choices.threads.max(1);
    let builder = builder.with_intra_threads(threads).map_err(said)?;
    let builder = builder.with_intra_op_spinning(false).map_err(said)?;
    match choices.device {
        Device::Cpu => Ok(builder),
        Device::Cuda(number) => with_cuda(builder, number),
    }
}

#[cfg(feature = "cuda")]
fn with_cuda(builder: SessionBuilder, number: i32) -> std::result::Result<SessionBuilder, String> {
    let cuda = ort::ep::CUDA::default().with_device_id(number);
    let providers = [cuda.build().error_on_failure()];
    builder.with_execution_providers(providers).map_err(|error| {
        format!(
            "GPU {number} cannot be used ({}): install onnxruntime-gpu[cuda,cudnn] and name its \
             libonnxruntime.so by {}",
            one_line(&error),
            runtime::VARIABLE
        )
    })
}

#[cfg(not(feature = "cuda"))]
fn with_cuda(_: SessionBuilder, _: i32) -> std::result::Result<SessionBuilder, String> {
    Err("this program computes on the processor alone: build it with --features cuda".to_owned())
}

fn input_of(session: &Session, said: Said) -> std::result::Result<Input, String> {
    let inputs = session.inputs();
    let [input] = inputs else {
        let names: Vec<&str> = inputs.iter().map(|input| input.name()).collect();
        return Err(format!(
            "it has {} inputs ({}): expected one, a picture",
            inputs.len(),
            names.join(", ")
        ));
    };
    let ValueType::Tensor { ty, shape, .. } = input.dtype() else {
        return Err(format!(
            "its input {:?} is no tensor: expected a picture",
            input.name()
        ));
    };
    let declared = input::Declared {
        name: input.name(),
        element: *ty,
        dimensions: shape,
    };
    Input::of(declared, said)
}

fn outputs_of(session: &Session) -> Vec<output::Declared> {
    let mut outputs = Vec::new();
    for output in session.outputs() {
        let tensor = match output.dtype() {
            ValueType::Tensor { ty, shape, .. } => Some((*ty, shape.to_vec())),
            _ => None,
        };
        outputs.push(output::Declared {
            name: output.name().to_owned(),
            tensor,
        });
    }
    outputs
}

/// The hash of a model's file, 16 hexadecimal digits.
///
/// # Errors
/// Those of the file.
pub fn hash(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(DataError::io(path))?;
    let mut hasher = Xxh3::new();
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block).map_err(DataError::io(path))? {
            0 => return Ok(format!("{:016x}", hasher.digest())),
            num_read => hasher.update(&block[..num_read]),
        }
    }
}

/// An error's message without its line ends.
fn one_line(error: &impl ToString) -> String {
    error
        .to_string()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}
