//! Which library multiplies what on this processor.
//!
//! The choice depends on the processor's maker and features only, never on a timing: two runs on
//! one machine make the same choice, and so the same numbers.
//!
//! | processor | fp32 linear layers | convolutions 1x1 | products of bf16 numbers |
//! |---|---|---|---|
//! | Intel with AMX | libtorch (MKL) | products (MKL) | bf16 instructions |
//! | Intel without AMX | libtorch (MKL) | products (MKL) | fp32 |
//! | others with AVX-512 bf16 | oneDNN | oneDNN | bf16 instructions |
//! | others on x86 | oneDNN | oneDNN | fp32 |
//! | other architectures | oneDNN, where libtorch has it | libtorch | bf16 instructions |
//!
//! Measured, with two cores each:
//! - AMD EPYC (docs/log.md, 2026-11-25): MKL reaches half of oneDNN's speed in fp32.
//! - Intel Xeon with AVX-512 and without AMX (benches/runs/2026-11-29-step): fp32 products of
//!   linear layers reach 232 to 330 GFLOP/s by MKL; by oneDNN the forward pass is as fast, and the
//!   gradients of weights reach 131 to 281, because their inputs are transposed first. oneDNN
//!   spends 1.6 times as long on bf16 numbers in a step of the 48 M UNet as on fp32 numbers in the
//!   same products and convolutions (9.2 s and 5.7 s in four steps, by its own count). A
//!   convolution of single pixels with its gradients is 1.1 to 1.7 times as fast by MKL.
//! - Intel with AMX, and x86 without bf16 instructions: not measured.

use std::sync::OnceLock;

/// What this processor is best at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choices {
    /// oneDNN multiplies in fp32 linear layers, not the library that libtorch chooses.
    pub(crate) onednn_linear: bool,
    /// Convolutions of single pixels are products of matrices, not oneDNN's convolutions.
    pub(crate) pointwise_products: bool,
    /// Numbers in bf16 are widened to fp32, multiplied, and the sums rounded to bf16. Sums are in
    /// fp32 in either case.
    pub(crate) widens_bf16: bool,
}

/// The features of a processor that decide.
#[derive(Debug, Clone, Copy)]
struct Features {
    is_x86: bool,
    is_intel: bool,
    /// Matrix tiles for bf16.
    has_amx: bool,
    /// AVX-512's dot products of bf16 numbers.
    has_bf16: bool,
}

/// Returns what a user who trains in bf16 on this processor should know, if there is something.
pub fn about_bf16() -> Option<&'static str> {
    let about = "bf16 saves memory and not time on this processor: it has no fast bf16 \
                 instructions, and products are calculated in fp32";
    Choices::here().widens_bf16.then_some(about)
}

impl Choices {
    /// Returns the choices for this processor.
    pub(crate) fn here() -> Self {
        static HERE: OnceLock<Choices> = OnceLock::new();
        *HERE.get_or_init(|| Self::of(Features::here()))
    }

    fn of(features: Features) -> Self {
        let has_fast_bf16 = features.has_amx || (features.has_bf16 && !features.is_intel);
        Self {
            onednn_linear: !features.is_intel,
            pointwise_products: features.is_intel,
            widens_bf16: features.is_x86 && !has_fast_bf16,
        }
    }
}

impl Features {
    #[cfg(target_arch = "x86_64")]
    fn here() -> Self {
        use std::arch::x86_64::{__cpuid, __cpuid_count};

        const VENDOR: u32 = 0;
        const EXTENDED: u32 = 7;
        const AMX_BF16: u32 = 1 << 22;
        let vendor = __cpuid(VENDOR);
        let has_extended = vendor.eax >= EXTENDED;
        Self {
            is_x86: true,
            // "GenuineIntel" in three registers.
            is_intel: [vendor.ebx, vendor.edx, vendor.ecx]
                == [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes),
            has_amx: has_extended && __cpuid_count(EXTENDED, 0).edx & AMX_BF16 != 0,
            has_bf16: is_x86_feature_detected!("avx512bf16"),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn here() -> Self {
        Self {
            is_x86: false,
            is_intel: false,
            has_amx: false,
            has_bf16: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_of_the_table_is_chosen() {
        // is_x86, is_intel, has_amx, has_bf16; oneDNN's linear layers, widening
        let rows = [
            ([true, true, true, true], [false, false]),
            ([true, true, false, true], [false, true]),
            ([true, true, false, false], [false, true]),
            ([true, false, false, true], [true, false]),
            ([true, false, false, false], [true, true]),
            ([false, false, false, false], [true, false]),
        ];
        for ([is_x86, is_intel, has_amx, has_bf16], [onednn_linear, widens_bf16]) in rows {
            let features = Features {
                is_x86,
                is_intel,
                has_amx,
                has_bf16,
            };
            let expected = Choices {
                onednn_linear,
                pointwise_products: is_intel,
                widens_bf16,
            };
            assert_eq!(Choices::of(features), expected, "{features:?}");
        }
    }

    #[test]
    fn the_choice_stays() {
        assert_eq!(Choices::here(), Choices::of(Features::here()));
    }
}
