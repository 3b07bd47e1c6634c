//! The activation functions that configurations name.

use crate::config::reader::Reader;

/// The activation function of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x)
    Silu,
    /// x Phi(x), without the tanh approximation
    Gelu,
    /// x sigmoid(1.702 x)
    QuickGelu,
}

impl Reader<'_> {
    /// An activation function, which must be one of `supported`.
    pub(crate) fn activation(
        &mut self,
        key: &str,
        default: Activation,
        supported: &[Activation],
    ) -> Activation {
        let names: Vec<_> = supported.iter().map(Activation::name).collect();
        let expected = names.join(" or ");
        self.typed(key, default, &expected, |value| {
            Activation::named(value.as_str()?, supported)
        })
    }
}

impl Activation {
    fn name(&self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::QuickGelu => "quick_gelu",
        }
    }

    /// Returns the one of `supported` with this name.
    fn named(name: &str, supported: &[Self]) -> Option<Self> {
        let name = if name == "swish" { "silu" } else { name };
        supported.iter().copied().find(|a| a.name() == name)
    }
}
