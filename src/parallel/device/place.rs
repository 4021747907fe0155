//! Where the ranks of a group are, and what can connect their devices.

use super::DeviceTransport;
use super::board::process;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::collective::MOST_RANKS;
use crate::parallel::group::Group;

/// Where a rank is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Its number in the world.
    pub rank: usize,
    /// The process.
    pub process: u64,
    /// The device within the process.
    pub device: u64,
    /// The GPU, where it is one.
    pub gpu: Option<[u8; 16]>,
}

/// The places of all ranks.
pub(super) fn places(host: &Group, device: &Device) -> Result<Vec<Place>> {
    let gpu = device.uuid();
    host.agree(gpu.as_ref().map(drop).map_err(Error::failure))?;
    let gpu = gpu?.map(u128::from_be_bytes);
    let mut all = vec![[0u128; 4]; host.size()];
    let mine = [process().into(), device.identity().into(), gpu.is_some().into(), gpu.unwrap_or(0)];
    host.all_gather(&mut all, &[mine])?;
    let place = |(rank, [process, device, is_gpu, gpu]): (usize, [u128; 4])| Place {
        rank: host.world_rank(rank),
        process: process as u64,
        device: device as u64,
        gpu: (is_gpu != 0).then(|| gpu.to_be_bytes()),
    };
    Ok(all.into_iter().enumerate().map(place).collect())
}

/// What connects these ranks best: nothing but their memory where they share it.
pub(super) fn choose(places: &[Place]) -> Result<DeviceTransport> {
    match check_local(places) {
        Ok(()) => Ok(DeviceTransport::Local),
        Err(_) => check_nccl(places).map(|()| DeviceTransport::Nccl),
    }
}

/// Whether the ranks are threads of one process with one device.
pub(super) fn check_local(places: &[Place]) -> Result<()> {
    let first = &places[0];
    let other = |apart: &dyn Fn(&Place) -> bool| places.iter().find(|place| apart(place));
    let refused = |rank: usize, what: &str| {
        Err(Error::usage(format!(
            "rank {rank} {what} rank {}, and only threads of one process that share one device reach one \
             another's memory; connect the ranks by NCCL",
            first.rank
        )))
    };
    if let Some(place) = other(&|place| place.process != first.process) {
        return refused(place.rank, "is in another process than");
    }
    if let Some(place) = other(&|place| place.device != first.device) {
        return refused(place.rank, "has another device than");
    }
    if places.len() > MOST_RANKS {
        return Err(Error::usage(format!(
            "{} ranks share one device, and at most {MOST_RANKS} can; start fewer",
            places.len()
        )));
    }
    Ok(())
}

/// Whether every rank has a GPU of its own.
pub(super) fn check_nccl(places: &[Place]) -> Result<()> {
    const SHARE: &str = "run them as threads of one process that share one device";
    if let Some(place) = places.iter().find(|place| place.gpu.is_none()) {
        return Err(Error::usage(format!(
            "rank {} has no GPU, and NCCL, which connects the devices of different ranks, needs one for each; \
             give every rank a GPU, or {SHARE}",
            place.rank
        )));
    }
    for (i, place) in places.iter().enumerate() {
        let Some(twin) = places[..i].iter().find(|twin| twin.gpu == place.gpu) else { continue };
        return Err(Error::usage(format!(
            "ranks {} and {} are on one GPU ({}), and NCCL takes one rank a GPU; start at most as many ranks on a \
             machine as it has GPUs, or {SHARE}",
            twin.rank,
            place.rank,
            place.gpu.map_or_else(String::new, |uuid| text(&uuid))
        )));
    }
    Ok(())
}

/// As `nvidia-smi -L` writes it.
fn text(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(rank: usize, process: u64, device: u64, gpu: u8) -> Place {
        Place { rank, process, device, gpu: (gpu > 0).then_some([gpu; 16]) }
    }

    #[test]
    fn what_connects_which_ranks() {
        let is = |places: &[Place], transport| assert_eq!(choose(places).unwrap(), transport, "{places:?}");
        is(&[place(0, 1, 1, 0)], DeviceTransport::Local);
        is(&[place(0, 1, 1, 0), place(1, 1, 1, 0)], DeviceTransport::Local);
        is(&[place(0, 1, 1, 7), place(1, 1, 1, 7)], DeviceTransport::Local);
        // Threads with a GPU each, and processes.
        is(&[place(0, 1, 1, 7), place(1, 1, 2, 8)], DeviceTransport::Nccl);
        is(&[place(0, 1, 1, 7), place(1, 2, 1, 8)], DeviceTransport::Nccl);
    }

    #[test]
    fn what_connects_none() {
        let says = |places: &[Place]| choose(places).unwrap_err().to_string();
        let text = says(&[place(0, 1, 1, 7), place(3, 2, 1, 8), place(6, 3, 1, 7)]);
        assert!(
            text.starts_with("ranks 0 and 6 are on one GPU (GPU-07070707-0707-0707-0707-070707070707)"),
            "{text}"
        );
        let text = says(&[place(0, 1, 1, 7), place(1, 2, 1, 0)]);
        assert!(text.starts_with("rank 1 has no GPU, and NCCL"), "{text}");
        let local = |places: &[Place]| check_local(places).unwrap_err().to_string();
        let text = local(&[place(0, 1, 1, 7), place(1, 2, 1, 8)]);
        assert!(text.starts_with("rank 1 is in another process than rank 0, and"), "{text}");
        let text = local(&[place(4, 1, 1, 7), place(5, 1, 2, 8)]);
        assert!(text.starts_with("rank 5 has another device than rank 4, and"), "{text}");
        let many: Vec<Place> = (0..65).map(|rank| place(rank, 1, 1, 0)).collect();
        assert!(local(&many).starts_with("65 ranks share one device, and at most 64 can"));
    }
}
