//! The layers of all models: linear, convolution, norms, residual block, resampling, sinusoids.
//!
//! Every forward function returns libtorch's error instead of panicking: shapes are checked where
//! tensors enter a model, and the remaining failure is a lack of memory, which callers must be able
//! to report. Activations are `[b, c, h, w]` or `[b, n, d]`.

use tch::{Device, Kind, Tensor};

use crate::{
    config::activation::Activation,
    torch::{
        ffi::Torch,
        kernels::{conv2d, linear, norm_silu},
    },
    weights::{Scope, init::Init},
};

impl Activation {
    pub(crate) fn forward(self, x: &Tensor) -> Torch {
        match self {
            Self::Silu => x.f_silu(),
            Self::Gelu => x.f_gelu("none"),
            Self::QuickGelu => x.f_mul_scalar(1.702)?.f_sigmoid()?.f_mul(x),
        }
    }
}

/// y = x W^T + b
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn new(scope: &mut Scope<'_>, inputs: i64, outputs: i64) -> Self {
        let bias = Some(scope.take("bias", &[outputs], Init::fan_in(inputs)));
        Self {
            bias,
            ..Self::without_bias(scope, inputs, outputs)
        }
    }

    pub(crate) fn without_bias(scope: &mut Scope<'_>, inputs: i64, outputs: i64) -> Self {
        Self {
            weight: scope.take("weight", &[outputs, inputs], Init::fan_in(inputs)),
            bias: None,
        }
    }

    /// Creates a layer with a normal initial weight and, if `bias`, a zero bias, unlike PyTorch's
    /// default.
    pub(crate) fn normal(
        scope: &mut Scope<'_>,
        [inputs, outputs]: [i64; 2],
        std: f64,
        bias: bool,
    ) -> Self {
        Self {
            weight: scope.take("weight", &[outputs, inputs], Init::Normal { std }),
            bias: bias.then(|| scope.take("bias", &[outputs], Init::Zeros)),
        }
    }

    /// Returns the dtype of the weight.
    pub(crate) fn kind(&self) -> Kind {
        self.weight.kind()
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Torch {
        linear(x, &self.weight, self.bias.as_ref())
    }
}

/// A 2-D convolution.
#[derive(Debug)]
pub(crate) struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
}

impl Conv {
    /// Creates a convolution of stride 1 that keeps height and width; `kernel` is odd.
    pub(crate) fn new(scope: &mut Scope<'_>, inputs: i64, outputs: i64, kernel: i64) -> Self {
        let init = Init::fan_in(inputs * kernel * kernel);
        Self {
            weight: scope.take("weight", &[outputs, inputs, kernel, kernel], init),
            bias: scope.take("bias", &[outputs], init),
            stride: 1,
            padding: kernel / 2,
        }
    }

    /// Returns the dtype of the weight.
    pub(crate) fn kind(&self) -> Kind {
        self.weight.kind()
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Torch {
        conv2d(x, &self.weight, &self.bias, self.stride, self.padding)
    }
}

/// Returns a norm's weight in the dtype that the kernel needs for `x`. The CPU's kernels accept an
/// fp32 weight with activations of lower precision; CUDA's need one dtype and calculate in fp32
/// internally.
fn beside(weight: &Tensor, x: &Tensor) -> Torch {
    if x.device() == Device::Cpu {
        Ok(weight.shallow_clone())
    } else {
        weight.f_to_kind(x.kind())
    }
}

/// Normalises groups of channels over space.
#[derive(Debug)]
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    num_groups: i64,
    eps: f64,
}

impl GroupNorm {
    pub(crate) fn new(scope: &mut Scope<'_>, channels: i64, norm: Norm) -> Self {
        Self {
            weight: scope.take("weight", &[channels], Init::Ones),
            bias: scope.take("bias", &[channels], Init::Zeros),
            num_groups: norm.num_groups,
            eps: norm.eps,
        }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Torch {
        let (weight, bias) = (beside(&self.weight, x)?, beside(&self.bias, x)?);
        x.f_group_norm(self.num_groups, Some(&weight), Some(&bias), self.eps, true)
    }

    /// Normalises and applies SiLU, the activation that usually follows.
    pub(crate) fn forward_silu(&self, x: &Tensor) -> Torch {
        let fused = norm_silu(x, [&self.weight, &self.bias], self.num_groups, self.eps);
        fused.unwrap_or_else(|| self.forward(x)?.f_silu())
    }
}

/// The settings of a group norm.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm {
    pub(crate) num_groups: i64,
    pub(crate) eps: f64,
}

/// Normalises each token.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub(crate) fn new(scope: &mut Scope<'_>, width: i64, eps: f64) -> Self {
        Self {
            weight: scope.take("weight", &[width], Init::Ones),
            bias: scope.take("bias", &[width], Init::Zeros),
            eps,
        }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Torch {
        let (weight, bias) = (beside(&self.weight, x)?, beside(&self.bias, x)?);
        x.f_layer_norm(
            self.weight.size(),
            Some(&weight),
            Some(&bias),
            self.eps,
            true,
        )
    }
}

/// diffusers' `ResnetBlock2D`: two convolutions with a skip connection, and the time embedding
/// added between them.
#[derive(Debug)]
pub(crate) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv,
    conv_shortcut: Option<Conv>,
}

impl Resnet {
    /// `time_dim` is the width of the time embedding, in models that have one.
    pub(crate) fn new(
        scope: &mut Scope<'_>,
        [inputs, outputs]: [i64; 2],
        time_dim: Option<i64>,
        norm: Norm,
    ) -> Self {
        Self {
            norm1: GroupNorm::new(&mut scope.sub("norm1"), inputs, norm),
            conv1: Conv::new(&mut scope.sub("conv1"), inputs, outputs, 3),
            time_emb_proj: time_dim
                .map(|dim| Linear::new(&mut scope.sub("time_emb_proj"), dim, outputs)),
            norm2: GroupNorm::new(&mut scope.sub("norm2"), outputs, norm),
            conv2: Conv::new(&mut scope.sub("conv2"), outputs, outputs, 3),
            conv_shortcut: (inputs != outputs)
                .then(|| Conv::new(&mut scope.sub("conv_shortcut"), inputs, outputs, 1)),
        }
    }

    /// `time` is the embedding after its activation, `[b, time_dim]`.
    pub(crate) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Torch {
        let mut hidden = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        if let (Some(projection), Some(time)) = (&self.time_emb_proj, time) {
            let shift = projection.forward(time)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?; // [b, c, 1, 1]
            hidden = hidden.f_add(&shift)?;
        }
        let hidden = self.conv2.forward(&self.norm2.forward_silu(&hidden)?)?;
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x)?.f_add(&hidden),
            None => x.f_add(&hidden),
        }
    }
}

/// Halves height and width.
#[derive(Debug)]
pub(crate) struct Downsample {
    conv: Conv,
}

impl Downsample {
    /// With `padding` 0, one pixel is added at the right and the bottom only, as in the VAE.
    pub(crate) fn new(scope: &mut Scope<'_>, channels: i64, padding: i64) -> Self {
        Self {
            conv: Conv {
                stride: 2,
                padding,
                ..Conv::new(&mut scope.sub("conv"), channels, channels, 3)
            },
        }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Torch {
        if self.conv.padding == 0 {
            self.conv.forward(&x.f_constant_pad_nd([0, 1, 0, 1])?)
        } else {
            self.conv.forward(x)
        }
    }
}

/// Doubles height and width, or resizes to a given size.
#[derive(Debug)]
pub(crate) struct Upsample {
    conv: Conv,
}

impl Upsample {
    pub(crate) fn new(scope: &mut Scope<'_>, channels: i64) -> Self {
        Self {
            conv: Conv::new(&mut scope.sub("conv"), channels, channels, 3),
        }
    }

    /// `size` is the height and width of the result if they are not twice the input's.
    pub(crate) fn forward(&self, x: &Tensor, size: Option<[i64; 2]>) -> Torch {
        let [h, w] = height_width(x);
        let larger = match size {
            Some(size) if size != [2 * h, 2 * w] => x.f_upsample_nearest2d(size, None, None)?,
            _ => x.f_upsample_nearest2d([2 * h, 2 * w], 2.0, 2.0)?,
        };
        self.conv.forward(&larger)
    }
}

/// Returns height and width of a `[b, c, h, w]` tensor.
pub(crate) fn height_width(x: &Tensor) -> [i64; 2] {
    let size = x.size();
    [size[size.len() - 2], size[size.len() - 1]]
}

/// Sinusoids of a number: half cosines and half sines with geometrically decreasing frequencies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sinusoid {
    pub(crate) dim: i64,
    pub(crate) cos_first: bool,
    pub(crate) freq_shift: f64,
}

impl Sinusoid {
    /// Maps `[k]` to `[k, dim]`, in fp32 for every dtype of the model: bf16 has 8 significant bits
    /// and cannot tell the times 999 and 1000 apart.
    pub(crate) fn forward(self, numbers: &Tensor) -> Torch {
        let numbers = numbers.f_to_kind(Kind::Float)?;
        let half = self.dim / 2;
        let exponents = Tensor::f_arange(half, (Kind::Float, numbers.device()))?;
        let log_period = -(10000f64.ln());
        let exponents = exponents
            .f_mul_scalar(log_period)?
            .f_div_scalar(half as f64 - self.freq_shift)?;
        let angles = numbers
            .f_unsqueeze(1)?
            .f_mul(&exponents.f_exp()?.f_unsqueeze(0)?)?; // [k, dim / 2]
        let (sin, cos) = (angles.f_sin()?, angles.f_cos()?);
        let both = if self.cos_first {
            [cos, sin]
        } else {
            [sin, cos]
        };
        let embedded = Tensor::f_cat(&both, 1)?;
        if self.dim % 2 == 1 {
            embedded.f_constant_pad_nd([0, 1])
        } else {
            Ok(embedded)
        }
    }
}

/// Two linear layers that map sinusoids to an embedding.
#[derive(Debug)]
pub(crate) struct TimeEmbedding {
    linear_1: Linear,
    linear_2: Linear,
}

impl TimeEmbedding {
    pub(crate) fn new(scope: &mut Scope<'_>, inputs: i64, width: i64) -> Self {
        Self {
            linear_1: Linear::new(&mut scope.sub("linear_1"), inputs, width),
            linear_2: Linear::new(&mut scope.sub("linear_2"), width, width),
        }
    }

    /// Returns the dtype of the weights.
    pub(crate) fn kind(&self) -> Kind {
        self.linear_1.kind()
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Torch {
        self.linear_2.forward(&self.linear_1.forward(x)?.f_silu()?)
    }
}
