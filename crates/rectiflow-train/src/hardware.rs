//! GPUs and the links between them: the figures that `run.hardware` and `rectiflow plan` use for a
//! machine that does not exist yet. Pure.
//!
//! Arithmetic and memory are the vendors' figures. Bandwidths of links are those that NCCL assumes
//! (`src/graph/topo.h`: 20.6 GB/s for each of Hopper's 18 NVLinks, 20.0 of Ampere's 12, 40.1 of
//! Blackwell's 18; 12 GB/s for PCIe 3 x16 and for 100 Gbit/s of network), and latencies are those
//! of its ring (`src/graph/tuning.cc`, "simple" protocol). Bandwidths are up to a fifth below the
//! nominal ones. Prices are not included: the user supplies them.

use rectiflow_sdxl::Error as ModelError;

use crate::error::Result;

/// A GPU model and the machine it is sold in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hardware {
    /// Name in recipes and on the command line.
    pub name: &'static str,
    /// Full name.
    pub label: &'static str,
    /// Peak of dense bf16 products with fp32 accumulation, in FLOP/s: the denominator of MFU.
    pub peak_flops: f64,
    /// Memory in bytes.
    pub memory_bytes: f64,
    /// GPUs per machine.
    pub gpus_per_node: usize,
    /// Link between the GPUs of a machine.
    pub inside: Link,
    /// Source of the figures.
    pub source: &'static str,
}

/// Bandwidth of one GPU, sending and receiving at the same time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Full name.
    pub label: &'static str,
    /// Bytes per second, in each direction.
    pub bytes_per_sec: f64,
    /// Seconds that each hop adds.
    pub latency_secs: f64,
}

/// A network between machines.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Network {
    /// Name on the command line.
    pub name: &'static str,
    /// Full name.
    pub label: &'static str,
    /// Bytes per second of one card, in each direction.
    pub card_bytes_per_sec: f64,
    /// Whether each GPU has its own card; otherwise the GPUs of a machine share one.
    pub card_for_each_gpu: bool,
    /// Seconds that each hop adds.
    pub latency_secs: f64,
}

const NET_LATENCY_SECS: f64 = 14e-6;

const fn nvlink(label: &'static str, links: f64, giga_bytes_per_sec: f64) -> Link {
    Link {
        label,
        bytes_per_sec: links * giga_bytes_per_sec * 1e9,
        latency_secs: 3.4e-6,
    }
}

const fn pcie(label: &'static str, giga_bytes_per_sec: f64) -> Link {
    Link {
        label,
        bytes_per_sec: giga_bytes_per_sec * 1e9,
        latency_secs: 5.7e-6,
    }
}

const NVLINK_3: Link = nvlink("NVLink 3", 12.0, 20.0);
const NVLINK_4: Link = nvlink("NVLink 4", 18.0, 20.6);
const NVLINK_5: Link = nvlink("NVLink 5", 18.0, 40.1);
const PCIE_4: Link = pcie("PCIe 4 x16", 24.0);
const PCIE_5: Link = pcie("PCIe 5 x16", 48.0);

const fn gpu(
    names: [&'static str; 2],
    tera_flops: f64,
    giga_bytes: f64,
    inside: Link,
    source: &'static str,
) -> Hardware {
    let [name, label] = names;
    let (peak_flops, memory_bytes) = (tera_flops * 1e12, giga_bytes * 1e9);
    Hardware {
        name,
        label,
        peak_flops,
        memory_bytes,
        gpus_per_node: 8,
        inside,
        source,
    }
}

/// All known GPUs.
pub const HARDWARE: &[Hardware] = &[
    gpu(
        ["h100-sxm", "H100 SXM 80 GB"],
        989.4,
        80.0,
        NVLINK_4,
        "NVIDIA H100 Tensor Core GPU Architecture, white paper",
    ),
    gpu(
        ["h100-pcie", "H100 PCIe 80 GB"],
        756.0,
        80.0,
        PCIE_5,
        "NVIDIA H100 Tensor Core GPU Architecture, white paper",
    ),
    gpu(
        ["h200-sxm", "H200 SXM 141 GB"],
        989.4,
        141.0,
        NVLINK_4,
        "NVIDIA H200 data sheet (half of the sparse figure)",
    ),
    gpu(
        ["b200-sxm", "B200 SXM 180 GB"],
        2250.0,
        180.0,
        NVLINK_5,
        "NVIDIA HGX B200 data sheet (half of the sparse figure)",
    ),
    gpu(
        ["a100-80gb", "A100 SXM 80 GB"],
        312.0,
        80.0,
        NVLINK_3,
        "NVIDIA A100 data sheet",
    ),
    gpu(
        ["a100-40gb", "A100 SXM 40 GB"],
        312.0,
        40.0,
        NVLINK_3,
        "NVIDIA A100 data sheet",
    ),
    gpu(
        ["l40s", "L40S 48 GB"],
        362.05,
        48.0,
        PCIE_4,
        "NVIDIA L40S data sheet (half of the sparse figure)",
    ),
    gpu(
        ["rtx-4090", "GeForce RTX 4090 24 GB"],
        165.2,
        24.0,
        PCIE_4,
        "NVIDIA Ada GPU Architecture, white paper",
    ),
    gpu(
        ["rtx-3090", "GeForce RTX 3090 24 GB"],
        71.0,
        24.0,
        PCIE_4,
        "NVIDIA Ampere GA102 GPU Architecture, white paper",
    ),
];

/// All known networks.
pub const NETWORKS: &[Network] = &[
    Network {
        name: "ib-400",
        label: "400 Gbit/s InfiniBand, a card for each GPU",
        card_bytes_per_sec: 48e9,
        card_for_each_gpu: true,
        latency_secs: NET_LATENCY_SECS,
    },
    Network {
        name: "eth-100",
        label: "100 Gbit/s Ethernet, one card a machine",
        card_bytes_per_sec: 12e9,
        card_for_each_gpu: false,
        latency_secs: NET_LATENCY_SECS,
    },
];

impl Network {
    /// Returns the share of one GPU when `gpus` GPUs of a machine send at the same time.
    pub fn link(&self, gpus: usize) -> Link {
        let sharing = if self.card_for_each_gpu {
            1.0
        } else {
            gpus.max(1) as f64
        };
        let bytes_per_sec = self.card_bytes_per_sec / sharing;
        Link {
            label: self.label,
            bytes_per_sec,
            latency_secs: self.latency_secs,
        }
    }
}

/// Returns the GPU of that name.
///
/// # Errors
/// [`crate::error::Error::Model`] with the nearest name and all valid ones.
pub fn hardware(name: &str) -> Result<&'static Hardware> {
    let names: Vec<&str> = HARDWARE.iter().map(|known| known.name).collect();
    let found = HARDWARE.iter().find(|known| known.name == name);
    Ok(found.ok_or_else(|| ModelError::unknown_name("hardware", name, &names))?)
}

/// Returns the network of that name.
///
/// # Errors
/// As [`hardware`].
pub fn network(name: &str) -> Result<&'static Network> {
    let names: Vec<&str> = NETWORKS.iter().map(|known| known.name).collect();
    let found = NETWORKS.iter().find(|known| known.name == name);
    Ok(found.ok_or_else(|| ModelError::unknown_name("network", name, &names))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_misspelt_ones_answered_with_the_nearest() {
        assert!((hardware("h100-sxm").expect("a name").peak_flops - 989.4e12).abs() < 1.0);
        let reason = hardware("h100sxm")
            .expect_err("there is no such name")
            .to_string();
        assert!(
            reason.contains("h100sxm") && reason.contains("did you mean h100-sxm?"),
            "{reason}"
        );
        assert!(
            network("ib400")
                .expect_err("there is no such name")
                .to_string()
                .contains("ib-400")
        );
    }

    #[test]
    fn a_shared_card_is_divided() {
        let rates =
            |name| [1, 8].map(|gpus| network(name).expect("a name").link(gpus).bytes_per_sec);
        assert_eq!(
            [rates("ib-400"), rates("eth-100")],
            [[48e9, 48e9], [12e9, 1.5e9]]
        );
        assert!((hardware("h100-sxm").expect("a name").inside.bytes_per_sec - 370.8e9).abs() < 1.0);
    }
}
