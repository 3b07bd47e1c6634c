//! How bright pictures are, and the colour of their border.

use rectiflow_data::picture::Picture;

/// Width of the border, which counts as background.
const BORDER_PX: u32 = 4;

/// The mean of all pixels' three values, 0 to 1.
pub(crate) fn brightness(picture: &Picture) -> f64 {
    let sum: f64 = picture.pixels().iter().map(|&value| f64::from(value)).sum();
    sum / (255.0 * picture.pixels().len() as f64)
}

/// The mean colour of the outermost pixels, 0 to 255.
pub(crate) fn border(picture: &Picture) -> [f64; 3] {
    let (width, height) = (picture.width_px(), picture.height_px());
    let mut sum = [0.0; 3];
    let mut count = 0.0;
    for y in 0..height {
        for x in 0..width {
            let to_edge = x.min(width - 1 - x).min(y).min(height - 1 - y);
            if to_edge >= BORDER_PX {
                continue;
            }
            for (sum, value) in sum.iter_mut().zip(picture.at(x, y)) {
                *sum += f64::from(value);
            }
            count += 1.0;
        }
    }
    sum.map(|value| value / count)
}

/// The brightness of a colour of 0 to 255, 0 to 1.
pub(crate) fn brightness_of([red, green, blue]: [f64; 3]) -> f64 {
    (red + green + blue) / (3.0 * 255.0)
}
