//! What a model takes: size, layout, element type and number of pictures at a time, as its file
//! says and the user adds. Pure.

use ort::value::TensorElementType;

/// Where the channels of an input are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Batch, channels, height, width: as PyTorch exports.
    Nchw,
    /// Batch, height, width, channels: as TensorFlow exports.
    Nhwc,
}

impl Layout {
    /// Both, with the names that users write.
    pub const ALL: [(&'static str, Self); 2] = [("nchw", Self::Nchw), ("nhwc", Self::Nhwc)];
}

/// The type of an input's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// Bytes: the model scales them itself.
    U8,
}

/// What a user says about an input, where the model's file leaves it open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Said {
    /// Width and height in pixels.
    pub size: Option<(u32, u32)>,
    /// The layout.
    pub layout: Option<Layout>,
    /// Most pictures at a time.
    pub batch: usize,
}

/// The input of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// Its name in the model.
    pub name: String,
    /// Where its channels are.
    pub layout: Layout,
    /// The type of its elements.
    pub element: Element,
    /// Width in pixels.
    pub width_px: u32,
    /// Height in pixels.
    pub height_px: u32,
    /// Pictures at a time.
    pub batch: usize,
    /// Whether it takes exactly `batch` pictures: a shorter batch is filled up.
    pub is_fixed: bool,
}

/// Largest side of an input in pixels.
const MAX_SIDE_PX: u32 = 4096;

/// What a model says about an input. A dimension of -1 is open.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Declared<'a> {
    pub(crate) name: &'a str,
    pub(crate) element: TensorElementType,
    pub(crate) dimensions: &'a [i64],
}

impl Input {
    /// The input that a model declares, with what the user says.
    ///
    /// # Errors
    /// Why it is no picture, or what remains open: what it has, what is expected, what to do.
    pub(crate) fn of(declared: Declared<'_>, said: Said) -> Result<Self, String> {
        let Declared {
            name,
            element,
            dimensions,
        } = declared;
        let shown = shape(dimensions);
        let &[batch, first, second, third] = dimensions else {
            return Err(format!(
                "its input {name:?} is {shown}: expected a picture, [n, 3, h, w] or [n, h, w, 3]"
            ));
        };
        let element = match element {
            TensorElementType::Float32 => Element::F32,
            TensorElementType::Float16 => Element::F16,
            TensorElementType::Uint8 => Element::U8,
            other => {
                return Err(format!(
                    "its input {name:?} has elements of type {other}: expected float32, float16 \
                     or uint8"
                ));
            }
        };
        let layout = layout([first, second, third], said.layout)
            .map_err(|reason| format!("its input {name:?} is {shown}: {reason}"))?;
        let (height, width) = match layout {
            Layout::Nchw => (second, third),
            Layout::Nhwc => (first, second),
        };
        let (width_px, height_px) = size((width, height), said.size)
            .map_err(|reason| format!("its input {name:?} is {shown}: {reason}"))?;
        let fixed = usize::try_from(batch).ok().filter(|&batch| batch > 0);
        Ok(Self {
            name: name.to_owned(),
            layout,
            element,
            width_px,
            height_px,
            batch: fixed.unwrap_or(said.batch.max(1)),
            is_fixed: fixed.is_some(),
        })
    }

    /// Elements of one picture.
    pub(crate) fn elements(&self) -> usize {
        3 * self.width_px as usize * self.height_px as usize
    }

    /// The shape of `num_pictures`.
    pub(crate) fn shape(&self, num_pictures: usize) -> [i64; 4] {
        let [n, w, h] = [
            num_pictures as i64,
            self.width_px.into(),
            self.height_px.into(),
        ];
        match self.layout {
            Layout::Nchw => [n, 3, h, w],
            Layout::Nhwc => [n, h, w, 3],
        }
    }
}

/// The layout, by which dimension has three channels.
fn layout(dimensions: [i64; 3], said: Option<Layout>) -> Result<Layout, String> {
    let [first, _, third] = dimensions;
    let can_be = |channels: i64| channels == 3 || channels < 0;
    let possible = |layout: Layout| match layout {
        Layout::Nchw => can_be(first),
        Layout::Nhwc => can_be(third),
    };
    match said {
        Some(said) if possible(said) => return Ok(said),
        Some(_) => return Err("the layout that you name has no three channels there".to_owned()),
        None => {}
    }
    match (first == 3, third == 3) {
        (true, false) => Ok(Layout::Nchw),
        (false, true) => Ok(Layout::Nhwc),
        (false, false) if !can_be(first) && !can_be(third) => {
            Err("expected three channels, [n, 3, h, w] or [n, h, w, 3]".to_owned())
        }
        _ => Err("which dimension has the channels is open: name the layout".to_owned()),
    }
}

/// Width and height, which the model and the user must not say differently.
fn size(declared: (i64, i64), said: Option<(u32, u32)>) -> Result<(u32, u32), String> {
    let side = |declared: i64, said: Option<u32>| match (u32::try_from(declared).ok(), said) {
        (Some(declared), Some(said)) if declared != said => {
            Err(format!("it takes {declared} pixels where you say {said}"))
        }
        (Some(side), _) | (None, Some(side)) => Ok(side),
        (None, None) => Err("its size in pixels is open: name it".to_owned()),
    };
    let width = side(declared.0, said.map(|said| said.0))?;
    let height = side(declared.1, said.map(|said| said.1))?;
    let range = 1..=MAX_SIDE_PX;
    if range.contains(&width) && range.contains(&height) {
        return Ok((width, height));
    }
    Err(format!(
        "sides of {width} and {height} pixels, expected 1 to {MAX_SIDE_PX}"
    ))
}

/// A shape in a message; "?" is an open dimension.
pub(crate) fn shape(dimensions: &[i64]) -> String {
    let mut shown = Vec::new();
    for &dimension in dimensions {
        shown.push(match dimension {
            0.. => dimension.to_string(),
            _ => "?".to_owned(),
        });
    }
    format!("[{}]", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(dimensions: &[i64], said: Said) -> Result<Input, String> {
        let declared = Declared {
            name: "x",
            element: TensorElementType::Float32,
            dimensions,
        };
        Input::of(declared, said)
    }

    #[test]
    fn size_and_layout_are_the_model_s() {
        let said = Said {
            batch: 8,
            ..Said::default()
        };
        let found = input(&[-1, 448, 320, 3], said).unwrap();
        assert_eq!((found.width_px, found.height_px), (320, 448));
        assert_eq!(
            (found.layout, found.batch, found.is_fixed),
            (Layout::Nhwc, 8, false)
        );
        assert_eq!(found.shape(2), [2, 448, 320, 3]);
        let found = input(&[1, 3, 224, 256], said).unwrap();
        assert_eq!((found.width_px, found.height_px), (256, 224));
        assert_eq!(
            (found.layout, found.batch, found.is_fixed),
            (Layout::Nchw, 1, true)
        );
        assert_eq!(
            (found.shape(1), found.elements()),
            ([1, 3, 224, 256], 3 * 224 * 256)
        );
    }

    #[test]
    fn what_the_model_leaves_open_is_the_user_s() {
        let said = Said {
            size: Some((64, 48)),
            ..Said::default()
        };
        let found = input(&[-1, 3, -1, -1], said).unwrap();
        assert_eq!((found.width_px, found.height_px, found.batch), (64, 48, 1));
        let nhwc = Said {
            layout: Some(Layout::Nhwc),
            ..said
        };
        assert_eq!(input(&[-1, -1, -1, -1], nhwc).unwrap().layout, Layout::Nhwc);
        assert_eq!(
            input(&[1, 3, 48, 3], Said { size: None, ..nhwc })
                .unwrap()
                .width_px,
            48
        );
    }

    #[test]
    fn other_inputs_are_refused_with_what_is_expected() {
        let said = Said {
            size: Some((64, 48)),
            ..Said::default()
        };
        for (dimensions, expected) in [
            (&[1, 77][..], "is [1, 77]: expected a picture"),
            (&[1, 1, 28, 28], "expected three channels"),
            (&[1, 3, 48, 3], "name the layout"),
            (&[-1, -1, -1, -1], "name the layout"),
            (&[1, 3, 50, 64], "takes 50 pixels where you say 48"),
            (&[1, 3, 0, 64], "takes 0 pixels"),
        ] {
            let problem = input(dimensions, said).unwrap_err();
            assert!(problem.contains(expected), "{problem}");
        }
        let problem = input(&[-1, 3, -1, -1], Said::default()).unwrap_err();
        assert!(
            problem.contains("[?, 3, ?, ?]: its size in pixels is open"),
            "{problem}"
        );
        let problem = input(&[1, 3, 9000, 9000], Said::default()).unwrap_err();
        assert!(problem.contains("expected 1 to 4096"), "{problem}");
        let declared = Declared {
            name: "ids",
            element: TensorElementType::Int64,
            dimensions: &[1, 3, 8, 8],
        };
        let problem = Input::of(declared, said).unwrap_err();
        assert!(problem.contains("expected float32"), "{problem}");
    }
}
