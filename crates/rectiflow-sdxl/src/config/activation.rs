//! The non-linearities that configurations name.

use crate::config::reader::Reader;

/// The non-linearity of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x)
    Silu,
    /// x Phi(x), exactly
    Gelu,
    /// x sigmoid(1.702 x)
    QuickGelu,
}

impl Reader<'_> {
    /// A non-linearity, which must be one of `supported`.
    pub(crate) fn activation(&mut self, key: &str, default: Activation, supported: &[Activation]) -> Activation {
        let names: Vec<_> = supported.iter().map(|a| activation_name(*a)).collect();
        let expected = names.join(" or ");
        self.typed(key, default, &expected, |value| {
            let name = value.as_str().map(|name| if name == "swish" { "silu" } else { name });
            supported.iter().copied().find(|a| Some(activation_name(*a)) == name)
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
