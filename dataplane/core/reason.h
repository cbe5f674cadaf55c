/* Every verdict has one reason, and every reason one stable name.
 *
 * NAT_REASON(id, name, kind, meaning, advice): `name` is what counters, metrics, dsnat-replay and dsnatctl
 * print; once released it is never renamed. `kind` says which verdict carries it. A packet that is forwarded
 * carries `ok`. The shells (io/) count the reasons of the last block; the core never gives them.
 */
#ifndef NAT_REASON_H
#define NAT_REASON_H

/* clang-format off */
#define NAT_REASONS(NAT_REASON) \
	NAT_REASON(OK, "ok", FORWARD, "translated", "") \
	/* passed to the kernel */ \
	NAT_REASON(LOCAL, "local", PASS, "addressed to the gateway itself", "") \
	NAT_REASON(GROUP, "group", PASS, "multicast or broadcast", "") \
	NAT_REASON(ZONE_PASS, "zone_pass", PASS, "a zone with action pass", "") \
	NAT_REASON(INSIDE_ONLY, "inside_only", PASS, "from inside to a destination inside", "") \
	NAT_REASON(OTHER_PROTOCOL, "other_protocol", PASS, "neither TCP, UDP nor ICMP, and other_protocols is pass", "") \
	NAT_REASON(KERNEL_ROUTE, "kernel_route", PASS, "an outside packet that belongs to a pass zone", "") \
	/* parse */ \
	NAT_REASON(TRUNCATED, "truncated", DROP, "fewer bytes than the headers say", "look for a broken sender or a wrong MTU") \
	NAT_REASON(BAD_VERSION, "bad_version", DROP, "not IP version 4", "") \
	NAT_REASON(BAD_HEADER, "bad_header", DROP, "IPv4 header length or total length is impossible", "look for a broken sender") \
	NAT_REASON(BAD_OPTION, "bad_option", DROP, "IPv4 option of an impossible length, or a source route", "look for a broken sender or a forged packet") \
	NAT_REASON(BAD_CHECKSUM, "bad_checksum", DROP, "IPv4 header checksum is wrong", "look for a failing link or memory") \
	NAT_REASON(BAD_SOURCE, "bad_source", DROP, "source is loopback, link-local, multicast, broadcast or 0.0.0.0/8", "look for a misconfigured host") \
	NAT_REASON(BAD_DESTINATION, "bad_destination", DROP, "destination is loopback, link-local, reserved or 0.0.0.0/8", "look for a misconfigured host") \
	NAT_REASON(BAD_PORT, "bad_port", DROP, "TCP or UDP port 0", "") \
	NAT_REASON(BAD_LENGTH, "bad_length", DROP, "TCP or UDP header length is impossible", "look for a broken sender") \
	/* classify */ \
	NAT_REASON(NO_ZONE, "no_zone", DROP, "no zone matches the source", "add a zone for this source, or ignore it") \
	NAT_REASON(ZONE_DROP, "zone_drop", DROP, "a zone with action drop", "") \
	NAT_REASON(PROTOCOL, "protocol", DROP, "neither TCP, UDP nor ICMP", "use a pass zone for this destination if it must cross") \
	NAT_REASON(SPOOFED, "spoofed", DROP, "source is one of our own pool addresses", "look for a loop or a forged source") \
	NAT_REASON(NOT_OURS, "not_ours", DROP, "from outside to an address that is neither a pool's nor the gateway's", "check the routes of the upstream router") \
	NAT_REASON(POOL_INACTIVE, "pool_inactive", DROP, "the pool follows a VRRP address that this gateway does not hold", "expected on a backup") \
	/* session */ \
	NAT_REASON(NO_SESSION, "no_session", DROP, "unsolicited packet to a pool address", "expected background noise") \
	NAT_REASON(FILTERED, "filtered", DROP, "the mapping's filter does not admit this remote", "see the pool's filtering key") \
	NAT_REASON(TCP_NOT_SYN, "tcp_not_syn", DROP, "TCP packet in mid-flow without a session", "see tcp_midflow; expected after a session expired") \
	/* allocate */ \
	NAT_REASON(POOL_EMPTY, "pool_empty", DROP, "the pool has no address in service", "add addresses or end the drain") \
	NAT_REASON(NO_PORT, "no_port", DROP, "no port of any address is free towards this remote", "add addresses to the pool") \
	NAT_REASON(TABLE_FULL, "table_full", DROP, "max_sessions reached", "raise engine.max_sessions") \
	NAT_REASON(HOST_SESSIONS, "host_sessions", DROP, "the host has limits.sessions_per_host sessions", "look for an infected host, or raise the limit") \
	NAT_REASON(HOST_PORTS, "host_ports", DROP, "the host has used up its port blocks", "look for an infected host, or raise blocks_per_host") \
	NAT_REASON(HOST_RATE, "host_rate", DROP, "the host opens sessions faster than limits.new_per_host_per_s", "look for an infected host, or raise the limit") \
	/* route */ \
	NAT_REASON(NO_ROUTE, "no_route", DROP, "the kernel has no route to the destination", "check the default route") \
	NAT_REASON(TTL_EXPIRED, "ttl_expired", DROP, "TTL was 1 or less", "expected with traceroute; else look for a loop") \
	NAT_REASON(TOO_BIG, "too_big", DROP, "larger than the next MTU, and DF is set", "expected with path MTU discovery") \
	/* icmp */ \
	NAT_REASON(ICMP_TYPE, "icmp_type", DROP, "ICMP type that is neither echo nor a translated error", "") \
	NAT_REASON(ICMP_CHECKSUM, "icmp_checksum", DROP, "ICMP error with a wrong checksum", "look for a failing link or memory") \
	NAT_REASON(ICMP_QUOTE, "icmp_quote", DROP, "ICMP error whose quoted packet cannot be read", "") \
	NAT_REASON(ICMP_NO_SESSION, "icmp_no_session", DROP, "ICMP error about a packet that has no session", "expected background noise") \
	/* fragments */ \
	NAT_REASON(FRAG_BAD, "frag_bad", DROP, "fragment that overlaps the transport header or runs past 65535 bytes", "an attack or a broken sender") \
	NAT_REASON(FRAG_FULL, "frag_full", DROP, "too many datagrams in fragments, or too many held fragments", "a fragment flood, or raise limits.fragments") \
	NAT_REASON(FRAG_TIMEOUT, "frag_timeout", DROP, "held fragment whose first fragment never came", "loss on the way, or a fragment flood") \
	/* given by the shells */ \
	NAT_REASON(NOT_IPV4, "not_ipv4", PASS, "ARP, IPv6, LLDP, VLAN: frames that are the kernel's business", "") \
	NAT_REASON(ARP_ANSWERED, "arp_answered", PASS, "ARP request for a pool address, answered by the engine", "") \
	NAT_REASON(OTHER_HOST, "other_host", DROP, "frame for another host's MAC address", "expected behind a hub or a flooding switch") \
	NAT_REASON(NO_NEIGHBOUR, "no_neighbour", DROP, "the next hop did not answer ARP", "check the next hop") \
	NAT_REASON(TX_FULL, "tx_full", DROP, "the port's transmit queue was full", "the port is saturated") \
	NAT_REASON(TWIN_FULL, "twin_full", DROP, "the kernel twin's queue was full or its rate limit was reached", "a flood towards the gateway itself") \
	NAT_REASON(NO_BUFFER, "no_buffer", DROP, "no packet buffer left", "raise the number of buffers") \
	NAT_REASON(HANDOVER_FULL, "handover_full", DROP, "the owning worker's ring was full", "a worker is overloaded") \
	NAT_REASON(HANDOVER_LOST, "handover_lost", DROP, "workers handed it to each other without end", "expected for a moment after a reload; else a fault of the engine") \
	NAT_REASON(LINK_DOWN, "link_down", DROP, "the outgoing port has no link", "check the cable")
/* clang-format on */

enum nat_reason {
#define NAT_REASON_ENUM(id, name, kind, meaning, advice) NAT_REASON_##id,
	NAT_REASONS(NAT_REASON_ENUM)
#undef NAT_REASON_ENUM
		NAT_REASON_COUNT
};

#endif
