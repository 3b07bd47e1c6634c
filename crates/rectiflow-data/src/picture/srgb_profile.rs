//! Which colour profiles equal sRGB, so that the pixels of such a picture need no conversion.
//!
//! Most profiles in pictures are one of a dozen spellings of sRGB. They differ in the last digits
//! of their primaries and in how the curve is written: lcms2's, which Pillow embeds, changes one
//! 8-bit value in 160 by 1, and no value by more. So a profile is compared by what it does and not
//! by its name: it converts a lattice of colours with 16 bits, and counts as sRGB if no 8-bit value
//! changes by more than 1.

use moxcms::{ColorProfile, DataColorSpace, Layout, TransformOptions};

/// Profiles that a thread remembers: a folder of pictures has a few.
const REMEMBERED: usize = 16;
/// Values of a channel in the lattice, besides grays and pure colours of all 256 values.
const STEPS: u16 = 17;
/// Largest change of a 16-bit value that is at most 1 in 8 bits: one and a half steps of 257.
const LARGEST_CHANGE: u16 = 385;

/// Profiles that were compared with sRGB, newest last.
#[derive(Debug, Default)]
pub(crate) struct ComparedProfiles(Vec<(blake3::Hash, bool)>);

impl ComparedProfiles {
    /// Whether a profile changes no 8-bit value of a colour by more than 1.
    pub(crate) fn equals_srgb(&mut self, profile: &[u8]) -> bool {
        let hash = blake3::hash(profile);
        if let Some(&(_, equal)) = self.0.iter().find(|(known, _)| *known == hash) {
            return equal;
        }
        let equal = changes_little(profile);
        if self.0.len() == REMEMBERED {
            self.0.remove(0);
        }
        self.0.push((hash, equal));
        equal
    }
}

fn changes_little(profile: &[u8]) -> bool {
    let Ok(profile) = ColorProfile::new_from_slice(profile) else {
        return false;
    };
    if profile.color_space != DataColorSpace::Rgb {
        return false;
    }
    // Floating point: the fixed point of a fast conversion is coarser than the differences.
    let options = TransformOptions {
        prefer_fixed_point: false,
        ..TransformOptions::default()
    };
    let srgb = ColorProfile::new_srgb();
    let transform = profile.create_transform_16bit(Layout::Rgb, &srgb, Layout::Rgb, options);
    let before = lattice();
    let mut after = vec![0; before.len()];
    let done = transform.and_then(|transform| transform.transform(&before, &mut after));
    done.is_ok()
        && before
            .iter()
            .zip(&after)
            .all(|(&a, &b)| a.abs_diff(b) <= LARGEST_CHANGE)
}

/// Colours with 16 bits, all of them 8-bit values: grays, pure colours, and a lattice of the cube.
fn lattice() -> Vec<u16> {
    let mut colours = Vec::new();
    for value in 0..=255 {
        for [red, green, blue] in [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]] {
            colours.extend([red * value, green * value, blue * value]);
        }
    }
    for index in 0..STEPS * STEPS * STEPS {
        let steps = [index / STEPS / STEPS, index / STEPS % STEPS, index % STEPS];
        colours.extend(steps.map(|step| step * 255 / (STEPS - 1)));
    }
    // 65535 / 255 = 257.
    colours.into_iter().map(|value| value * 257).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the conversion by a profile makes of every 8-bit colour: the largest change.
    fn largest_change(profile: &[u8]) -> u8 {
        let profile = ColorProfile::new_from_slice(profile).unwrap();
        let srgb = ColorProfile::new_srgb();
        let options = TransformOptions::default();
        let transform = profile
            .create_transform_8bit(Layout::Rgb, &srgb, Layout::Rgb, options)
            .unwrap();
        let mut largest = 0;
        for red in 0..=255 {
            let mut plane = Vec::with_capacity(3 << 16);
            for index in 0..=u16::MAX {
                let [green, blue] = index.to_be_bytes();
                plane.extend([red, green, blue]);
            }
            let mut after = vec![0; plane.len()];
            transform.transform(&plane, &mut after).unwrap();
            for (&a, &b) in plane.iter().zip(&after) {
                largest = largest.max(a.abs_diff(b));
            }
        }
        largest
    }

    /// Of lcms2 and of Debian's icc-profiles-free; scripts/golden/pictures.py says more.
    const SRGB: [(&str, &[u8]); 2] = [
        (
            "lcms2",
            include_bytes!("../../tests/golden/srgb-pillow.icc"),
        ),
        ("free", include_bytes!("../../tests/golden/srgb-free.icc")),
    ];
    const ADOBE: &[u8] = include_bytes!("../../tests/golden/adobe-rgb-free.icc");

    #[test]
    fn profiles_of_srgb_change_no_colour_by_more_than_one() {
        let own = ColorProfile::new_srgb().encode().unwrap();
        for (name, profile) in SRGB.into_iter().chain([("moxcms", own.as_slice())]) {
            assert!(ComparedProfiles::default().equals_srgb(profile), "{name}");
            assert!(largest_change(profile) <= 1, "{name}");
        }
    }

    #[test]
    fn other_profiles_are_not_taken_for_srgb() {
        let gamma = {
            let mut profile = ColorProfile::new_srgb();
            let curve = moxcms::ToneReprCurve::Parametric(vec![2.2]);
            profile.red_trc = Some(curve.clone());
            profile.green_trc = Some(curve.clone());
            profile.blue_trc = Some(curve);
            profile.cicp = None;
            profile
        };
        for (name, profile) in [
            ("Display P3", ColorProfile::new_display_p3()),
            ("Adobe RGB", ColorProfile::new_adobe_rgb()),
            ("sRGB's primaries, gamma 2.2", gamma),
            ("gray", ColorProfile::new_gray_with_gamma(2.2)),
        ] {
            let profile = profile.encode().unwrap();
            assert!(!ComparedProfiles::default().equals_srgb(&profile), "{name}");
        }
        for profile in [ADOBE, b"no profile"] {
            assert!(!ComparedProfiles::default().equals_srgb(profile));
        }
    }

    #[test]
    fn what_was_compared_is_remembered_and_bounded() {
        let own = ColorProfile::new_srgb().encode().unwrap();
        let mut compared = ComparedProfiles::default();
        for number in 0..40u8 {
            assert!(!compared.equals_srgb(&[number; 200]));
            assert!(compared.equals_srgb(&own));
            assert!(compared.0.len() <= REMEMBERED);
        }
    }
}
