//! A source of one image.

use trencadis::Result;
use trencadis::data::source::{Image, Source};

pub struct One(pub Image);

impl Source for One {
    fn len(&self) -> usize {
        1
    }

    fn name(&self, _: usize) -> String {
        "the image".into()
    }

    fn label(&self, _: usize) -> usize {
        0
    }

    fn size(&self, _: usize) -> Result<(usize, usize)> {
        Ok((self.0.height, self.0.width))
    }

    fn load(&self, _: usize, _: usize) -> Result<Image> {
        Ok(self.0.clone())
    }
}
