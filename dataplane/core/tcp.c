/* TCP as RFC 7857 section 2 (and RFC 6146 section 3.5.2) want a NAT to follow it.
 *
 *   opening      a SYN was seen from one side                       tcp_opening
 *   established  SYNs of both sides (simultaneous open included),   tcp_established
 *                also with one FIN: half-closed transfers go on
 *   closing      FINs of both sides, or a RST                       tcp_closing
 *
 * A RST is translated but only shortens the timer; the next segment that is not a RST takes that back, so a
 * blind RST from a third party cannot end a connection (RFC 7857 section 2.2). A new SYN from inside on a
 * closing tuple starts the walk again on the same mapping, and so does the SYN-ACK by which the inside
 * accepts a SYN from outside; that SYN alone never does, or a remote could hold a mapping open.
 */
#include "engine.h"

uint8_t nat_tcp_next(uint8_t state, uint8_t tcp_flags, bool inbound)
{
	const uint8_t both_fins = NAT_TCP_SAW_FIN_OUT | NAT_TCP_SAW_FIN_IN;

	if (tcp_flags & NAT_TCP_RST)
		return state | NAT_TCP_SAW_RST;
	if ((tcp_flags & NAT_TCP_SYN) && !inbound &&
	    ((state & both_fins) == both_fins || (state & NAT_TCP_SAW_RST)))
		return tcp_flags & NAT_TCP_ACK ? NAT_TCP_SAW_SYN_OUT | NAT_TCP_SAW_SYN_IN
					       : NAT_TCP_SAW_SYN_OUT;
	state &= (uint8_t)~NAT_TCP_SAW_RST;
	if (tcp_flags & NAT_TCP_SYN)
		state |= inbound ? NAT_TCP_SAW_SYN_IN : NAT_TCP_SAW_SYN_OUT;
	if (tcp_flags & NAT_TCP_FIN)
		state |= inbound ? NAT_TCP_SAW_FIN_IN : NAT_TCP_SAW_FIN_OUT;
	return state;
}

enum nat_timer nat_tcp_timer(uint8_t state)
{
	const uint8_t both_fins = NAT_TCP_SAW_FIN_OUT | NAT_TCP_SAW_FIN_IN;
	const uint8_t both_syns = NAT_TCP_SAW_SYN_OUT | NAT_TCP_SAW_SYN_IN;

	if ((state & NAT_TCP_SAW_RST) || (state & both_fins) == both_fins)
		return NAT_TIMER_TCP_CLOSING;
	return (state & both_syns) == both_syns ? NAT_TIMER_TCP_ESTABLISHED : NAT_TIMER_TCP_OPENING;
}
