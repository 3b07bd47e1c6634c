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
        let names: Vec<_> = supported.iter().map(|a| activation_name(*a)).collect();
        let expected = names.join(" or ");
        self.typed(key, default, &expected, |value| {
            let name = value
                .as_str()
                .map(|name| if name == "swish" { "silu" } else { name });
            supported
                .iter()
                .copied()
                .find(|a| Some(activation_name(*a)) == name)
        })
    }
}

fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::QuickGelu => "quick_gelu",
    }
}
