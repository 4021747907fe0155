//! stub
use crate::error::Result;
use crate::recipe::ModelConfig;
/// stub
pub fn check(_: &ModelConfig) -> Result<()> {
    Ok(())
}
